"""What a recipe of web data says: how its metadata names things, which rows to take, and what a picture must be.

The defaults are what most published sets need, so a recipe says only what differs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from ..scan import MAX_ASPECT, MIN_SIDE
from .expression import Filter
from .picture import MAX_JPEG_SIDE

ResizeMode = Literal["keep_ratio", "keep_ratio_largest", "no"]
HashKind = Literal["", "md5", "sha1", "sha256", "sha512"]

_ALWAYS = ("url", "caption")
NAMES = (*_ALWAYS, "hash", "face_boxes")
"""Columns that ingestion itself reads; any other name in `columns` is for the filter and for `save`."""


@dataclass(frozen=True)
class WebRecipe:
    """A published list of URLs and captions, to be downloaded."""

    metadata: str
    """How the metadata files are had, in a sentence; shown where they are missing."""
    license: str
    """Of the metadata. The pictures are their authors'."""
    source: Literal["web"] = "web"
    expected_rows: int = 0
    """Of the whole set, as published; 0 for unknown. Selecting says so where the metadata have
    others, by over 2 %; no row is left out or asked for by it."""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """Our name for a column -> its names in the metadata, of which the first that is there counts. A name that is not
    listed stands for itself."""
    header: tuple[str, ...] = ()
    """The columns of .tsv and .csv files that have no line of names."""
    filter: str = ""
    """Which rows to take, as in `similarity >= 0.3 and max(width, height) <= 3 * min(width, height)`. A comparison with
    a missing value is not true."""
    rows: int = 0
    """Take so many rows that pass the filter, the first in the order of the files; 0 for all."""
    duplicates: Literal["drop", "keep"] = "drop"
    """Of a URL that comes again, only the first row is downloaded."""
    save: tuple[str, ...] = ()
    """Columns to keep beside the shards and in each sample's json."""
    hash_kind: HashKind = ""
    """Of the column `hash`: what a picture's downloaded bytes must have. Empty: not checked."""
    image_size: int = 256
    """In pixels. No picture is enlarged."""
    resize_mode: ResizeMode = "keep_ratio"
    """keep_ratio: the short side becomes image_size. keep_ratio_largest: the long side does. no: sizes stay."""
    jpeg_quality: int = 95
    min_image_size: int = 32
    """Pictures with a shorter side are left out."""
    max_aspect_ratio: int = 10
    """Pictures with one side over so many times the other are left out."""
    samples_per_shard: int = 10_000
    """Rows of a shard, those that fail included. At most 10,000: a key is the shard in five digits and the row in
    four."""
    opt_out: tuple[str, ...] = ("noai", "noimageai", "noindex", "noimageindex")
    """Directives of the header X-Robots-Tag by which a site keeps its pictures out; [] ignores them."""

    def __post_init__(self) -> None:
        limits = {
            "expected_rows": (0, 10**12),
            "rows": (0, 10**12),
            "image_size": (MIN_SIDE, MAX_JPEG_SIDE),
            "jpeg_quality": (1, 100),
            "min_image_size": (MIN_SIDE, 10_000),
            "max_aspect_ratio": (1, MAX_ASPECT),
            "samples_per_shard": (1, 10_000),
        }
        for key, (low, high) in limits.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"{key} = {getattr(self, key)} is outside {low} to {high}")
        if not self.metadata.strip():
            raise ValueError("metadata is empty; say in a sentence how the files are had")
        for name, candidates in self.columns.items():
            if not candidates:
                raise ValueError(f"columns.{name} = [] names no column; give at least one")
        if self.hash_kind and self.hash_kind not in hashlib.algorithms_available:
            raise ValueError(f'hash_kind = "{self.hash_kind}" is not among this Python\'s hashes')
        if reserved := sorted(set(self.save) & RESERVED):
            raise ValueError(f'save = ["{reserved[0]}"] is a column that every shard has; leave it out')
        if self.filter:
            Filter(self.filter)

    def candidates(self, name: str) -> tuple[str, ...]:
        """Returns the names that a column may have in the metadata."""
        return self.columns.get(name, (name,))

    @property
    def needed(self) -> tuple[str, ...]:
        """Our names of the columns that must be there."""
        names = [*_ALWAYS, *(["hash"] if self.hash_kind else []), *(["face_boxes"] if self.blurs else [])]
        return tuple(dict.fromkeys([*names, *self.save, *(Filter(self.filter).names if self.filter else ())]))

    def asked_by(self, name: str) -> str:
        """Returns which keys of the recipe need a column, in words: `filter and save ask for it`."""
        if name in _ALWAYS:
            return "every recipe needs it"
        asks = {
            "filter": bool(self.filter) and name in Filter(self.filter).names,
            "save": name in self.save,
            "hash_kind": name == "hash" and bool(self.hash_kind),
            "columns": name == "face_boxes" and self.blurs,
        }
        keys = [key for key, is_so in asks.items() if is_so]
        return f"{' and '.join(keys)} ask{'s' if len(keys) == 1 else ''} for it"

    def remedy(self, missing: Mapping[str, str | None]) -> str:
        """Returns what to do where columns are not in the metadata; missing: our name -> the likeliest that is."""
        names = ", ".join(f'{name} = ["{near or "ITS NAME"}"]' for name, near in missing.items())
        advice = f"In the recipe, say what they call it: columns = {{ {names} }}"
        needless = [name for name in missing if name not in _ALWAYS]
        return advice + (f"; or do without {', '.join(needless)} there" if needless else "")

    @property
    def kept(self) -> tuple[str, ...]:
        """Our names of the columns that go into the work lists."""
        return tuple(name for name in self.needed if name in NAMES or name in self.save)

    @property
    def blurs(self) -> bool:
        """Whether the metadata say where faces are, which are then blurred."""
        return "face_boxes" in self.columns


RESERVED = frozenset(
    ("row", "key", "url", "caption", "status", "error_message", "width", "height", "original_width",
     "original_height", "sha256", "attempt", "previous_status")
)  # fmt: skip
