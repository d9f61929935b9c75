"""A folder of ingested shards in, what became of its rows out: by status and domain, sizes, caption lengths, over time.

Read from the shards' parquet files and the journal. A row that was tried again counts by its last fate. About 25 ms a
shard of 10,000 rows; memory is bounded, whatever the number of rows.
"""

import os
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from .accept import finished
from .fates import RETRIED, SUCCESS
from .progress import Stretch, read_journal, stretches

pc: Any = pyarrow.compute  # its functions are made at run time, and no type checker sees them

MAX_PLACES = 500_000
"""Domains that are told apart; when there are more, those with the fewest rows are counted together."""
OTHERS = "(others)"
_HOST = r"^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<place>\[[^\]/]*\]|[^/?#:]+)"
_FOLDER = r"^(?P<place>[^/]*)/"
_COLUMNS = ("url", "path", "shard", "caption", "status", "width", "height", "original_width", "original_height",
            "change", "previous_status")  # fmt: skip

Counts = npt.NDArray[np.int64]


class Spread:
    """How often each whole number came. Percentiles are exact."""

    def __init__(self, most: int) -> None:
        self.counts: Counts = np.zeros(most + 1, np.int64)
        """Index: the number; what is over the last is counted there."""

    def add(self, values: npt.NDArray[Any]) -> None:
        last = len(self.counts) - 1
        self.counts += np.bincount(np.clip(values, 0, last).astype(np.int64), minlength=last + 1)

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def percentile(self, share: float) -> int:
        """Returns the least number that at least this share (0 to 1) does not exceed; 0 where there is none."""
        return int(np.searchsorted(self.counts.cumsum(), max(1, share * self.total))) if self.total else 0

    def within(self, edges: Sequence[int]) -> Counts:
        """Returns how many lie from each edge to below the next, the last without an end."""
        return np.array([self.counts[low:high].sum() for low, high in zip(edges, [*edges[1:], None], strict=True)])


@dataclass
class Statistics:
    """What became of the rows of a folder."""

    place: str = "domain"
    """What `places` are: domain, folder or shard."""
    fates: Counter[str] = field(default_factory=Counter[str])
    changes: Counter[str] = field(default_factory=Counter[str])
    """Copy.change -> pictures kept."""
    places: Counter[str] = field(default_factory=Counter[str])
    """Place -> rows."""
    kept: Counter[str] = field(default_factory=Counter[str])
    """Place -> rows in a shard."""
    original: Spread = field(default_factory=lambda: Spread(65_535))
    """Short sides of the pictures that were kept, as they came, in pixels."""
    stored: Spread = field(default_factory=lambda: Spread(65_535))
    """The same as they are in the shards."""
    captions: Spread = field(default_factory=lambda: Spread(8_192))
    """Lengths of the captions in the shards, in characters."""
    shards: int = 0
    shard_bytes: int = 0
    downloaded_bytes: int = 0
    time: list[Stretch] = field(default_factory=list[Stretch])

    @property
    def rows(self) -> int:
        return sum(self.fates.values())

    @property
    def num_kept(self) -> int:
        return self.fates[SUCCESS]

    @property
    def retryable(self) -> int:
        return sum(number for fate, number in self.fates.items() if fate in RETRIED)


def statistics(out: Path) -> Statistics:
    """Returns what became of the rows of a folder so far. Raises ValueError where it has no such shards."""
    found = Statistics()
    for path in shard_parquets(out):
        if (report := finished(path)) is None:
            continue
        file = pq.ParquetFile(path)
        names = [name for name in _COLUMNS if name in file.schema_arrow.names]
        try:
            _add(found, file.read(names))
        except (OSError, pa.ArrowException) as error:
            raise ValueError(
                f"{path}: damaged ({str(error).splitlines()[0]}); delete it and run ingestion again"
            ) from None
        found.shards += bool(report.shard_bytes)
        found.shard_bytes += report.shard_bytes
        found.downloaded_bytes += report.downloaded_bytes
    if not found.rows:
        raise ValueError(f"{out}: no finished shards of ingestion in it; give the folder that ingest.py --out named")
    found.fates = Counter({fate: number for fate, number in found.fates.items() if number})
    found.time = stretches(read_journal(out / "_work"))
    return found


def shard_parquets(out: Path) -> Generator[Path]:
    """Gives the parquet files of a folder's shards, in order. Raises ValueError where there is no such folder."""
    if not out.is_dir():
        raise ValueError(f"{out}: no such folder; give the one that ingest.py --out named")
    with os.scandir(out) as entries:
        names = sorted(entry.name for entry in entries if entry.name.endswith(".parquet"))
    for name in names:
        if name.removesuffix(".parquet").isdigit():
            yield out / name


def _add(found: Statistics, table: Any) -> None:
    status, previous = table["status"], table["previous_status"]
    again = previous.is_valid()
    _count(found.fates, status, 1)
    _count(found.fates, previous.filter(again), -1)
    name = next((name for name in ("url", "path", "shard") if name in table.column_names), None)
    kept = table.filter(pc.equal(status, SUCCESS))
    if name is not None:
        found.place = {"url": "domain", "path": "folder", "shard": "shard"}[name]
        # A row that is tried again was counted, and was not kept: only what can be retried is.
        _count(found.places, _places(table.filter(pc.invert(again))[name], name), 1)
        _count(found.kept, _places(kept[name], name), 1)
        if len(found.places) > MAX_PLACES:
            _merge_small(found)
    if "change" in table.column_names:
        _count(found.changes, kept["change"], 1)
    for spread, columns in (
        (found.original, ("original_width", "original_height")),
        (found.stored, ("width", "height")),
    ):
        spread.add(pc.min_element_wise(*(kept[column] for column in columns)).to_numpy())
    found.captions.add(pc.utf8_length(kept["caption"]).to_numpy())


def _count(counter: Counter[str], values: Any, sign: int) -> None:
    for entry in pc.value_counts(values).to_pylist():
        counter[str(entry["values"])] += sign * entry["counts"]


def _places(column: Any, name: str) -> Any:
    """The domain of URLs, the first folder of paths, or the shard."""
    if name == "shard":
        return column
    found = pc.struct_field(pc.extract_regex(column, _HOST if name == "url" else _FOLDER), "place")
    return pc.utf8_lower(pc.fill_null(found, "(none)")) if name == "url" else pc.fill_null(found, "(top)")


def _merge_small(found: Statistics) -> None:
    for place, rows in found.places.most_common()[MAX_PLACES // 2 :]:
        if place != OTHERS:
            del found.places[place]
            found.places[OTHERS] += rows
            found.kept[OTHERS] += found.kept.pop(place, 0)
