"""Metadata files in, numbered work lists out: the rows to download, in order, and those not worth asking for.

A work list holds the rows of one future shard. A row that is known to be useless (no caption, no web address, a URL
that came before) stands in it with its status, so every row that passes the filter has one place for its fate.
Rows stream through in batches, so memory does not grow with their number. About a million rows a second of one core.
"""

import sys
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute

from ..scan import MAX_CAPTION_BYTES
from .duplicates import Seen
from .metadata import Source
from .web_recipe import WebRecipe
from .work_lists import Plan, finish, write_lists

pc: Any = pyarrow.compute  # its functions are made at run time, and no type checker sees them

_ROW = "\0row"
"""No metadata have a column of that name."""
_SCHEMES = ("http://", "https://")
_EXPECTED_WITHIN = 0.02
"""Share of a recipe's expected rows by which the metadata may differ unsaid: releases lose some, and most counts are
published as round numbers."""
STATUSES = ("bad url", "scheme", "no caption", "caption not UTF-8", "caption too long", "duplicate url")
"""What a row can be before anything is downloaded, by the first that applies."""


def select(recipe: WebRecipe, metadata: Sequence[Path], folder: Path) -> Plan:
    """Writes the work lists of the rows that a recipe takes. Raises ValueError where the metadata do not fit it."""
    source = Source(recipe, metadata)
    counts: Counter[str] = Counter()
    tables = _rows(source, recipe, counts)
    num_lists, rows = write_lists(tables, folder, 0, recipe.samples_per_shard)
    if not rows:
        # Nothing is begun then: the recipe may be corrected.
        files = f"--metadata {metadata[0]}" + (f" and {len(metadata) - 1:,} more files" if len(metadata) > 1 else "")
        if not counts["read"]:
            raise ValueError(f"{files}: no rows in it; give other files")
        raise ValueError(f'{files}: of {counts["read"]:,} rows none passes filter = "{recipe.filter}"; loosen it')
    if (remark := _other_size(recipe, counts["read"])) is not None:
        print(remark, file=sys.stderr)
    statuses = {status: counts[status] for status in STATUSES if counts[status]}
    plan = Plan(0, num_lists, rows, counts["read"], counts["filtered out"], statuses)
    finish(folder, plan)
    return plan


def _other_size(recipe: WebRecipe, rows_read: int) -> str | None:
    """What to say where all metadata were read and they are not of the size that was published."""
    expected = recipe.expected_rows
    # `rows` may have ended the reading early.
    if not expected or recipe.rows or abs(rows_read - expected) <= _EXPECTED_WITHIN * expected:
        return None
    return (
        f"warning: the metadata have {rows_read:,} rows, {rows_read / expected:.1%} of the {expected:,} published; "
        "a part of them, or another release?"
    )


def _rows(source: Source, recipe: WebRecipe, counts: Counter[str]) -> Generator[Any]:
    """The selected rows under our names, with their numbers and what is known of them; counts as it goes."""
    seen = Seen() if recipe.duplicates == "drop" else None
    left = recipe.rows or None
    schema: Any = None
    for batch in source.batches():
        numbers = pa.array(np.arange(counts["read"], counts["read"] + batch.table.num_rows))
        table = batch.table.append_column(_ROW, numbers)
        if batch.filter is not None:
            table = table.filter(batch.filter)
        if left is not None and table.num_rows >= left:
            table = table.slice(0, left)
            # The rows after the last one were not looked at, for all that is told.
            read = table[_ROW][-1].as_py() + 1 - counts["read"]
        else:
            read = batch.table.num_rows
        counts["read"] += read
        counts["filtered out"] += read - table.num_rows
        if table.num_rows:
            work = _work(table, batch.columns, recipe, seen, counts)
            schema = schema or work.schema
            yield work.cast(schema)
        if left is not None:
            left -= table.num_rows
            if not left:
                return


def _work(table: Any, columns: Mapping[str, str], recipe: WebRecipe, seen: Seen | None, counts: Counter[str]) -> Any:
    table = table.combine_chunks()
    url, url_bad = _text(table[columns["url"]])
    caption, caption_bad = _text(table[columns["caption"]])
    codes = np.full(table.num_rows, -1, np.int8)

    def mark(status: str, where: npt.NDArray[np.bool_]) -> None:
        codes[where & (codes < 0)] = STATUSES.index(status)

    has_scheme = _any(*(pc.starts_with(url, scheme) for scheme in _SCHEMES))
    # In capitals they are rare, and take fifty times as long to find.
    if len(others := np.flatnonzero(~has_scheme)):
        other = url.take(pa.array(others))
        has_scheme[others] = _any(*(pc.starts_with(other, scheme, ignore_case=True) for scheme in _SCHEMES))
        has_colon = np.ones(len(codes), bool)
        has_colon[others] = _true(pc.match_substring(other, ":"))
        mark("bad url", ~has_colon)
    mark("bad url", url_bad)
    mark("scheme", ~has_scheme)
    mark("caption not UTF-8", caption_bad)
    caption_bytes = pc.binary_length(caption)
    mark("no caption", ~_true(pc.greater(caption_bytes, 0)) | _true(pc.utf8_is_space(caption)))
    mark("caption too long", _true(pc.greater(caption_bytes, MAX_CAPTION_BYTES)))
    if seen is not None:
        # What will not be asked for must not stand in the way of a later row.
        wanted = np.flatnonzero(codes < 0)
        repeated = np.zeros(len(codes), bool)
        repeated[wanted] = seen.repeated(url if len(wanted) == len(codes) else url.take(pa.array(wanted)))
        mark("duplicate url", repeated)
    for code, count in zip(*np.unique(codes[codes >= 0], return_counts=True), strict=True):
        counts[STATUSES[code]] += int(count)
    status = pa.DictionaryArray.from_arrays(pa.array(codes, mask=codes < 0), pa.array(STATUSES))
    texts = {"url": url, "caption": caption}
    kept: dict[str, Any] = {name: texts.get(name, table[columns[name]]) for name in recipe.kept}
    return pa.table({"row": table[_ROW], **kept, "status": status.cast(pa.string())})


def _text(column: Any) -> tuple[Any, npt.NDArray[np.bool_]]:
    """A column as valid strings, and which of them are missing or were not valid UTF-8, which Arrow does not check."""
    array: Any = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if not pa.types.is_string(array.type):
        array = array.cast(pa.string(), safe=False)
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        raw: list[bytes | None] = array.cast(pa.binary()).to_pylist()
        texts = [None if item is None else item.decode(errors="replace") for item in raw]
        bad = [text is not None and text.encode() != item for text, item in zip(texts, raw, strict=True)]
        return pa.array(texts, pa.string()), np.array(bad)
    return array, np.zeros(len(array), bool)


def _true(mask: Any) -> npt.NDArray[np.bool_]:
    """Where a mask is true; a null is not."""
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)


def _any(*masks: Any) -> npt.NDArray[np.bool_]:
    return np.logical_or.reduce([_true(mask) for mask in masks])
