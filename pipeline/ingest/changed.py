"""Own data as they are and the work lists of an earlier run in, what has changed in between out.

A source is the same when listing it gives the same rows in the same order, and no file is another: by its size and
time; where these differ, a picture by its bytes, which the shard's parquet keeps a hash of, so that files which were
only copied or touched stay what they are.
"""

import hashlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .accept import finished
from .fetched import Fetched, Missing, Own, opened
from .listing import FILE, Row


class _Shard:
    """What became of the rows of a work list; looked at where it matters."""

    def __init__(self, parquet: Path) -> None:
        self._parquet = parquet

    @cached_property
    def fates(self) -> list[tuple[str, str | None]] | None:
        """(status, sha256 of the file) of each row; None where the list is still to be read."""
        if finished(self._parquet) is None:
            return None
        table = pq.read_table(self._parquet, columns=["status", "sha256"])
        return list(zip(table["status"].to_pylist(), table["sha256"].to_pylist(), strict=True))


@dataclass(frozen=True)
class _Listed:
    """A row of an earlier run."""

    row: Row
    shard: _Shard
    place: int
    """In its list."""


def changes(tables: Iterable[Any], lists: Sequence[tuple[Path, Path]], own: Own) -> list[str]:
    """Returns a phrase for each way in which a source has changed, none where it has not.

    tables: of its listing; lists: each work list, and the parquet of its shard, which may not be there yet.
    """
    now = (row for table in tables for row in table.to_pylist())
    then = _listed(lists)
    with opened(None, {}, own) as fetched:
        for row, listed in zip_longest(now, then):
            if row is None or listed is None or _difference(row, listed, own, fetched):
                rest = chain([listed] if listed else [], then)
                return _phrases(chain([row] if row else [], now), rest, own, fetched)
    return []


def _listed(lists: Sequence[tuple[Path, Path]]) -> Generator[_Listed]:
    for path, parquet in lists:
        shard = _Shard(parquet)
        for place, row in enumerate(pq.read_table(path).to_pylist()):
            yield _Listed(row, shard, place)


def _name(row: Row) -> str:
    return f"{row['shard']}: {row['source_key']}" if "shard" in row else row["path"]


def _difference(row: Row, listed: _Listed, own: Own, fetched: Fetched) -> str | None:
    """Returns how a row is not what it was, in the words of a phrase, or None where it is."""
    then = listed.row
    if _name(row) != _name(then):
        return "in another order"
    if (row["caption"], row["status"]) != (then["caption"], then["status"]):
        return "with another caption"
    # Lists of older folders say nothing of files.
    changed = FILE in then and row[FILE] != then[FILE]
    if own.is_shards:
        # Not by its picture's bytes: other members of a sample may have changed in place.
        changed = changed or row["members"] != then["members"]
    elif changed and row["status"] is None:
        changed = _is_other_picture(row, listed, fetched)
    else:
        changed = False
    return "changed" if changed else None


def _is_other_picture(row: Row, listed: _Listed, fetched: Fetched) -> bool:
    if (fates := listed.shard.fates) is None:
        return False  # it will be read as it is
    status, digest = fates[listed.place]
    try:
        return hashlib.sha256(fetched.image(row)).hexdigest() != digest
    except Missing as missing:
        return missing.fate != status


def _phrases(now: Iterator[Row], then: Iterator[_Listed], own: Own, fetched: Fetched) -> list[str]:
    """now and then: what is left of both, from the first difference on."""
    old: dict[tuple[str, int], _Listed] = dict(_numbered((_name(listed.row), listed) for listed in then))
    found: dict[str, list[str]] = {"added": [], "gone": [], "with another caption": [], "changed": []}
    for key, row in _numbered((_name(row), row) for row in now):
        listed = old.pop(key, None)
        how = "added" if listed is None else _difference(row, listed, own, fetched)
        if how is not None:
            found[how].append(key[0])
    found["gone"] = [name for name, _ in old]
    phrases = [f"{len(names):,} {how} ({_shown(names)})" for how, names in found.items() if names]
    return phrases or ["its rows are in another order"]


def _numbered(named: Iterable[tuple[str, Any]]) -> Generator[tuple[tuple[str, int], Any]]:
    """Tells rows of one name apart: a table may have several of a picture."""
    seen: Counter[str] = Counter()
    for name, value in named:
        yield (name, seen[name]), value
        seen[name] += 1


def _shown(names: Sequence[str]) -> str:
    return names[0] + (", ..." if len(names) > 1 else "")
