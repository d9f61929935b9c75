"""Metadata files in, batches of their rows out: the columns that a recipe asks for, by whichever name they have.

Files are .parquet, .tsv and .csv, or folders of them, read one after another in the order of their names.
"""

import difflib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from .expression import Filter

_BATCH_ROWS = 1 << 15
SUFFIXES = (".parquet", ".csv", ".tsv")
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_MAX_NAMES_SHOWN = 60


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
    def candidates(self, name: str) -> tuple[str, ...]: ...
    def asked_by(self, name: str) -> str:
        """Returns what needs a column, in words that go into brackets; may be empty."""
        ...

    def remedy(self, missing: Mapping[str, str | None]) -> str:
        """Returns what to do where columns are not there; missing: our name -> the likeliest name that is."""
        ...


@dataclass(frozen=True)
class Batch:
    """Some rows of a metadata file."""

    table: Any
    columns: Mapping[str, str]
    """Our name -> the table's."""
    filter: Any
    """An Arrow expression on the table, or None."""


def describe_files(metadata: Sequence[Path]) -> str:
    """Returns how many files and bytes these are, which tells other metadata from the same."""
    files = [file for path in metadata for file in _files(path)]
    return f"{len(files):,} files of {sum(file.stat().st_size for file in files):,} bytes"


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
            opened.close()
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
        self.columns = _columns(recipe, self._schema.names)
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
        found = (file for file in path.rglob("*") if file.suffix in SUFFIXES and not made & set(file.parents))
        if not (files := sorted(found)):
            raise ValueError(f"--metadata {path}: no {', '.join(SUFFIXES)} files in it")
        return files
    if not path.is_file():
        raise ValueError(f"--metadata {path}: no such file or folder")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"--metadata {path}: its name must end in one of {', '.join(SUFFIXES)}")
    return [path]


def _columns(recipe: Wanted, there: Sequence[str]) -> dict[str, str]:
    """Our name of each needed column -> its name in a file. Raises ValueError that names all that are not there."""
    names = {name: recipe.candidates(name) for name in recipe.needed}
    found = {name: next((one for one in candidates if one in there), None) for name, candidates in names.items()}
    if missing := [name for name, column in found.items() if column is None]:
        looked: list[str] = []
        for name in missing:
            words = " or ".join(f'"{candidate}"' for candidate in names[name])
            words += "" if names[name] == (name,) else f" for {name}"
            asked = recipe.asked_by(name)
            looked.append(words + (f" ({asked})" if asked else ""))
        near = {name: _near((name, *names[name]), there) for name in missing}
        shown = ", ".join(there[:_MAX_NAMES_SHOWN]) + (", ..." if len(there) > _MAX_NAMES_SHOWN else "")
        said = ", nor ".join(looked)
        raise ValueError(f"the metadata have no column {said}; they have: {shown}. {recipe.remedy(near)}")
    return {name: column for name, column in found.items() if column is not None}


def _near(names: Sequence[str], there: Sequence[str]) -> str | None:
    """The column whose name is nearest to one of these, whatever its case; None where none is near."""
    lower = {column.lower(): column for column in there}
    matches = (difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.75) for name in names)
    return next((lower[found[0]] for found in matches if found), None)
