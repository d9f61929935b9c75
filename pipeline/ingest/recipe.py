"""A recipe file (TOML) in, a checked frozen dataclass out; one dataclass a kind of source, chosen by the key `source`.

Whatever the user can get wrong (a missing file, an unknown key, a wrong type, a value out of range) raises ValueError
in one line that names the file, the key and what to do. A recipe with `extends = "other.toml"` is that recipe with its
own keys put over it, so that a subset is a file of two lines.
"""

import json
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ..command import did_you_mean
from .web_recipe import WebRecipe

Kind = TypeVar("Kind")
Split = Literal["train", "held_out"]

KIND_NAMES = {int: "a whole number", str: "a string", bool: "true or false", list: "a list", dict: "a table"}


@dataclass(frozen=True)
class Package:
    """One npm package at one exact version."""

    package: str
    """`NAME@VERSION`, as `npm pack` takes it."""
    integrity: str
    """`sha512-...`: the checksum of the tarball, as `npm view NAME@VERSION dist.integrity` prints it."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"(@[a-z0-9._-]+/)?[a-z0-9._-]+@\d+\.\d+\.\d+[a-z0-9.+-]*", self.package):
            raise ValueError(f'package = "{self.package}" is not NAME@VERSION with a full version such as 1.2.9')
        if not re.fullmatch(r"sha512-[A-Za-z0-9+/]{86}==", self.integrity):
            raise ValueError(
                f"integrity of {self.package} is not a sha512 checksum; "
                f"`npm view {self.package} dist.integrity` prints the right one"
            )

    @property
    def name(self) -> str:
        return self.package.rpartition("@")[0]

    @property
    def version(self) -> str:
        return self.package.rpartition("@")[2]


@dataclass(frozen=True)
class Style(Package):
    """An icon set: one drawing style, and the side of the split that it is on."""

    style: str
    """Its name in the records."""
    split: Split
    """`train`, or `held_out`: drawn only in the zero_shot and retrieval sets."""


@dataclass(frozen=True)
class EmojiRecipe:
    """The starter: emoji art in several drawing styles, as single pictures and as scenes."""

    labels: Package
    """The emojibase-data package that names and tags the pictures."""
    styles: tuple[Style, ...]
    source: Literal["emoji"] = "emoji"
    seed: int = 0
    """Of every choice: scenes, backgrounds, sizes, the order of the training samples."""
    image_size: int = 128
    """Width and height of every picture, in pixels."""
    jpeg_quality: int = 90
    trim: bool = True
    """Cut the margin around each drawing, which differs from set to set; false keeps it, and makes the styles differ
    in size as well."""
    samples_per_shard: int = 500
    """At most 10,000: a key is the shard in five digits and the row in four."""
    singles_per_picture: int = 1
    """Training samples that show one picture alone, for each picture of each training style."""
    train_scenes: int = 1000
    """Training samples that place one to four pictures on a background."""
    retrieval_scenes: int = 500
    """Scenes in the held-out style; their captions are all different."""
    seen_retrieval_scenes: int = 0
    """As many in the training styles, which training does not show: the set `retrieval_seen`."""
    scenes: Literal["spread", "grouped"] = "spread"
    """`spread`: one to four pictures on a background. `grouped`: small things, counted and placed."""
    names: tuple[str, ...] = ()
    """Only pictures of these names; by default all."""

    def __post_init__(self) -> None:
        limits = {
            "seed": (0, 2**63 - 1),
            "image_size": (32, 1024),
            "jpeg_quality": (1, 100),
            "samples_per_shard": (1, 10_000),
            "singles_per_picture": (0, 1000),
            "train_scenes": (0, 1_000_000),
            "retrieval_scenes": (0, 100_000),
            "seen_retrieval_scenes": (0, 100_000),
        }
        for key, (low, high) in limits.items():
            if not low <= getattr(self, key) <= high:
                raise ValueError(f"{key} = {getattr(self, key)} is outside {low} to {high}")
        self._check_styles()

    def _check_styles(self) -> None:
        names = [style.style for style in self.styles]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f'style "{name}" is listed twice')
        for split in get_args(Split):
            if not any(style.split == split for style in self.styles):
                raise ValueError(f'no style has split = "{split}"; give at least one')
        # Sets of one family (fluent flat, fluent high-contrast) share shapes: one would show the other, held out.
        sides: dict[str, str] = {}
        for style in self.styles:
            family = style.style.partition("-")[0]
            if sides.setdefault(family, style.split) != style.split:
                raise ValueError(f'the "{family}" styles are on both sides of the split; put them on one side')


Recipe = EmojiRecipe | WebRecipe
SOURCES: dict[str, type[Recipe]] = {"emoji": EmojiRecipe, "web": WebRecipe}
EXTENDS = "extends"
MAX_EXTENDED = 8


def load(path: Path) -> Recipe:
    """Returns the recipe in a TOML file, checked. Raises ValueError, in one line that starts with the path."""
    table = _read(path)
    try:
        return _build(_source(table), table, "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read(path: Path, depth: int = 0, extending: Path | None = None) -> dict[str, Any]:
    """Returns the table of a recipe file, over that of the one that it extends; extending: the one that names it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        where = f"{extending} extends it, from its own folder" if extending else "the recipes are in datasets/"
        raise ValueError(f"{path}: no such recipe file; {where}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as a recipe ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not valid TOML: {error}") from None
    try:
        # Before anything is missed for want of it: of a misspelt `extends` a whole recipe is.
        _refuse_unknown(table, [*_keys(table), EXTENDS], "")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if (base := table.pop(EXTENDS, None)) is None:
        return table
    if not isinstance(base, str) or depth == MAX_EXTENDED:
        reason = "recipes extend one another" if isinstance(base, str) else "it must be the name of a recipe file"
        raise ValueError(f"{path}: extends = {_shown(base)}: {reason}")
    return _over(_read(path.parent / base, depth + 1, path), table)


def _over(base: dict[str, Any], table: dict[str, Any]) -> dict[str, Any]:
    """Returns a recipe's table over that of the one that it extends, of `columns` entry by entry; [] drops one."""
    made = base | table
    below, above = base.get("columns"), table.get("columns")
    if isinstance(below, dict) and isinstance(above, dict):
        made["columns"] = {name: found for name, found in (below | above).items() if found != [] or name not in below}
    return made


def _keys(table: Mapping[str, Any]) -> list[str]:
    """The keys that a recipe file may have: of its source, where it says which, else of any."""
    source = table.get("source")
    kinds = [SOURCES[source]] if isinstance(source, str) and source in SOURCES else list(SOURCES.values())
    return list(dict.fromkeys(field.name for kind in kinds for field in fields(kind)))


def record(recipe: Recipe) -> dict[str, Any]:
    """Returns the resolved recipe as plain JSON values."""
    return json.loads(json.dumps(asdict(recipe)))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns one phrase for each key whose value differs between two records: `seed is 0 there and 1 here`."""
    phrases: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        short = all(isinstance(value, int | str | None) for value in (before, after))
        phrases.append(
            f"{key} is {json.dumps(before)} there and {json.dumps(after)} here" if short else f"{key} differ"
        )
    return phrases


def _source(table: Mapping[str, Any]) -> type[Recipe]:
    source = table.get("source")
    if not isinstance(source, str) or source not in SOURCES:
        given = "is missing" if source is None else f"= {_shown(source)} is unknown"
        other = f", or name a recipe by `{EXTENDS}`" if source is None else ""
        raise ValueError(f"source {given}; choose one of: {', '.join(sorted(SOURCES))}{other}")
    return SOURCES[source]


def _build(kind: type[Kind], table: Mapping[str, Any], where: str) -> Kind:
    """Returns the dataclass `kind` from a TOML table; `where` is the table's own name with a dot, for messages."""
    hints = get_type_hints(kind)
    assert is_dataclass(kind)
    _refuse_unknown(table, hints, where)
    for field in fields(kind):
        if field.default is field.default_factory is MISSING and field.name not in table:
            raise ValueError(f'key "{where}{field.name}" is missing')
    return kind(**{key: _convert(hints[key], value, where + key) for key, value in table.items()})


def _refuse_unknown(table: Mapping[str, Any], keys: Collection[str], where: str) -> None:
    """Raises ValueError for a key that is none of `keys`, with the nearest of them."""
    for key in table:
        if key not in keys:
            advice = did_you_mean(key, keys, f"the keys are: {', '.join(sorted(keys))}")
            raise ValueError(f'unknown key "{where}{key}"; {advice}')


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Returns a TOML value as what the field's type says: an int, a string, one of a few words, a dataclass or more."""
    kind = get_origin(hint) or hint
    if kind is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{key} = {_shown(value)} must be one of: {', '.join(get_args(hint))}")
        return value
    if kind is Mapping:
        names = _typed(value, dict, key)
        return {name: _convert(get_args(hint)[1], item, f"{key}.{name}") for name, item in names.items()}
    if kind is tuple:
        if get_args(hint)[0] is str and isinstance(value, str):
            return (value,)
        items = _typed(value, list, key)
        return tuple(_convert(get_args(hint)[0], item, f"{key}[{i}]") for i, item in enumerate(items))
    if is_dataclass(kind):
        return _build(hint, _typed(value, dict, key), f"{key}.")
    return _typed(value, kind, key)


def _typed(value: Any, kind: type, key: str) -> Any:
    # Not isinstance: TOML's true is a Python int.
    if type(value) is not kind:
        raise ValueError(f"{key} = {_shown(value)} must be {KIND_NAMES[kind]}")
    return value


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
