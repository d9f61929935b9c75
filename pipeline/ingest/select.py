"""Metadata files in, numbered work lists out: the rows to download, in order, and those not worth asking for.

A work list holds the rows of one future shard. A row that is known to be useless (no caption, no web address, a URL
that came before) stands in it with its status, so every row that passes the filter has one place for its fate.
Rows stream through in batches, so memory does not grow with their number. About a million rows a second of one core.
"""

import json
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ..files import write_text
from ..scan import MAX_CAPTION_BYTES
from .duplicates import Seen
from .expression import Filter
from .web_recipe import WebRecipe

pc: Any = pyarrow.compute  # its functions are made at run time, and no type checker sees them

PLAN_NAME = "plan.json"
_BATCH_ROWS = 1 << 15
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_SUFFIXES = (".parquet", *_DELIMITERS)
_ROW = "\0row"
"""No metadata have a column of that name."""
_SCHEMES = ("http://", "https://")
_EXPECTED_WITHIN = 0.02
"""Share of a recipe's expected rows by which the metadata may differ unsaid: releases lose some, and most counts are
published as round numbers."""
STATUSES = ("bad url", "scheme", "no caption", "caption not UTF-8", "caption too long", "duplicate url")
"""What a row can be before anything is downloaded, by the first that applies."""


@dataclass(frozen=True)
class Plan:
    """What was selected: the work lists of one pass over the web."""

    first_list: int
    num_lists: int
    rows: int
    """In the lists."""
    rows_read: int
    filtered_out: int
    statuses: dict[str, int] = field(default_factory=dict[str, int])
    """Of rows that will not be asked for."""
    problems: dict[str, str] = field(default_factory=dict[str, str])
    """Of own shards: file -> what is wrong with it as a whole."""

    @property
    def lists(self) -> range:
        return range(self.first_list, self.first_list + self.num_lists)


def read_plan(folder: Path) -> Plan | None:
    """Returns the plan of a folder of work lists, or None where none was finished."""
    try:
        return Plan(**json.loads((folder / PLAN_NAME).read_text()))
    except FileNotFoundError:
        return None


def list_path(folder: Path, list_id: int) -> Path:
    return folder / f"{list_id:05d}.parquet"


def write_lists(tables: Iterable[Any], folder: Path, first_list: int, list_rows: int) -> tuple[int, int]:
    """Writes rows as work lists of `list_rows` each, the last shorter. Returns the numbers of lists and of rows."""
    rows: list[Any] = []
    waiting = num_lists = total = 0
    for table in tables:
        rows.append(table)
        waiting += table.num_rows
        total += table.num_rows
        if waiting >= list_rows:
            whole = pa.concat_tables(rows)
            while waiting >= list_rows:
                _write(whole.slice(0, list_rows), list_path(folder, first_list + num_lists))
                whole, num_lists, waiting = whole.slice(list_rows), num_lists + 1, waiting - list_rows
            rows = [whole]
    if waiting:
        _write(pa.concat_tables(rows), list_path(folder, first_list + num_lists))
        num_lists += 1
    return num_lists, total


def finish(folder: Path, plan: Plan) -> None:
    """Writes the plan, which says that the lists are whole."""
    write_text(folder / PLAN_NAME, json.dumps(asdict(plan), indent=1) + "\n")


def select(recipe: WebRecipe, metadata: Sequence[Path], folder: Path) -> Plan:
    """Writes the work lists of the rows that a recipe takes. Raises ValueError where the metadata do not fit it."""
    source = Source(recipe, metadata)
    counts: Counter[str] = Counter()
    tables = _rows(source, recipe, counts)
    num_lists, rows = write_lists(tables, folder, 0, recipe.samples_per_shard)
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


def describe_files(metadata: Sequence[Path]) -> str:
    """Returns how many files and bytes these are, which tells other metadata from the same."""
    files = [file for path in metadata for file in _files(path)]
    return f"{len(files):,} files of {sum(file.stat().st_size for file in files):,} bytes"


@dataclass(frozen=True)
class Batch:
    """Some rows of a metadata file."""

    table: Any
    columns: Mapping[str, str]
    """Our name -> the table's."""
    filter: Any
    """An Arrow expression on the table, or None."""


class Wanted(Protocol):
    """What to read of metadata files: a web recipe, or whatever else names columns."""

    @property
    def metadata(self) -> str: ...
    @property
    def header(self) -> tuple[str, ...]: ...
    @property
    def filter(self) -> str: ...
    @property
    def needed(self) -> tuple[str, ...]: ...
    @property
    def advice(self) -> str: ...
    def candidates(self, name: str) -> tuple[str, ...]: ...


class Source:
    """The metadata files of a recipe, read one after another. Raises ValueError in one line for what does not fit."""

    def __init__(self, recipe: Wanted, metadata: Sequence[Path]) -> None:
        self._recipe = recipe
        self.files = [file for path in metadata for file in _files(path)]
        if not self.files:
            raise ValueError(f"--metadata is missing. {recipe.metadata}")
        # The first and the last now, the others when their turn comes.
        for file in (self.files[0], self.files[-1]):
            self._open(file).close()

    def batches(self) -> Generator[Batch]:
        """The needed columns of the rows, in order. Memory: a batch, and a page of each column."""
        for file in self.files:
            opened = self._open(file)
            try:
                for batch in opened.batches():
                    if batch.num_rows:
                        yield Batch(pa.Table.from_batches([batch]), opened.columns, opened.filter)
            except (OSError, pa.ArrowException) as error:
                raise ValueError(f"{file}: damaged metadata ({str(error).splitlines()[0]})") from None
            finally:
                opened.close()

    def _open(self, file: Path) -> "_File":
        try:
            opened = _File(file, self._recipe.header)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{file}: cannot be read as metadata ({str(error).splitlines()[0]})") from None
        try:
            opened.bind(self._recipe)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        return opened


class _File:
    """One metadata file, open."""

    def __init__(self, path: Path, header: tuple[str, ...]) -> None:
        self._path, self._header = path, header
        self.columns: dict[str, str] = {}
        self.filter: Any = None
        self._reader: Any
        if path.suffix == ".parquet":
            # Not the dataset scanner: it costs twice the time and four times the memory.
            self._reader = pq.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
            self._schema = self._reader.schema_arrow
        else:
            # Quotes are quotes in .csv files only: captions hold single ones.
            delimiter = _DELIMITERS[path.suffix]
            parse = pa_csv.ParseOptions(delimiter=delimiter, quote_char='"' if delimiter == "," else False)
            read = pa_csv.ReadOptions(column_names=list(header) or None, block_size=4 << 20)
            convert = pa_csv.ConvertOptions(check_utf8=False)
            self._reader = pa_csv.open_csv(path, read, parse, convert)
            self._schema = self._reader.schema

    def bind(self, recipe: Wanted) -> None:
        self.columns = {name: _column(name, recipe, self._schema.names) for name in recipe.needed}
        self.filter = Filter(recipe.filter).bind(self._schema, self.columns) if recipe.filter else None

    def batches(self) -> Iterable[Any]:
        if self._path.suffix == ".parquet":
            columns = list(dict.fromkeys(self.columns.values()))
            return self._reader.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False)
        return self._reader

    def close(self) -> None:
        self._reader.close()


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        # What this program made from some of them may lie among them, and has tables of its own.
        made = {recipe.parent for recipe in path.rglob("recipe.json")} - {path}
        found = (file for file in path.rglob("*") if file.suffix in _SUFFIXES and not made & set(file.parents))
        if not (files := sorted(found)):
            raise ValueError(f"--metadata {path}: no {', '.join(_SUFFIXES)} files in it")
        return files
    if not path.is_file():
        raise ValueError(f"--metadata {path}: no such file or folder")
    if path.suffix not in _SUFFIXES:
        raise ValueError(f"--metadata {path}: its name must end in one of {', '.join(_SUFFIXES)}")
    return [path]


def _column(name: str, recipe: Wanted, there: Sequence[str]) -> str:
    candidates = recipe.candidates(name)
    if (found := next((candidate for candidate in candidates if candidate in there), None)) is None:
        looked = " or ".join(f'"{candidate}"' for candidate in candidates)
        raise ValueError(
            f"the metadata have no column {looked} for {name}; they have: {', '.join(there)}. {recipe.advice}"
        )
    return found


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

    has_scheme = _any(*(pc.starts_with(url, scheme, ignore_case=True) for scheme in _SCHEMES))
    mark("bad url", url_bad | ~_true(pc.match_substring(url, ":")))
    mark("scheme", ~has_scheme)
    mark("caption not UTF-8", caption_bad)
    mark("no caption", ~_true(pc.greater(pc.binary_length(caption), 0)) | _true(pc.utf8_is_space(caption)))
    mark("caption too long", _true(pc.greater(pc.binary_length(caption), MAX_CAPTION_BYTES)))
    if seen is not None:
        # What will not be asked for must not stand in the way of a later row.
        wanted = codes < 0
        repeated = np.zeros(len(codes), bool)
        repeated[wanted] = seen.repeated(url.filter(pa.array(wanted)))
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


def _write(table: Any, path: Path) -> None:
    # URLs and captions do not repeat: a dictionary of them would only cost time.
    pq.write_table(table, path, compression="snappy", use_dictionary=False, write_statistics=False)
