"""Own data in, rows of work lists out: each picture's path and caption, and what is wrong before one is opened.

Nothing is decoded here. Of a folder its names are read, and the captions; of shards the headers and the captions.
"""

import mmap
import os
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..scan import JPEG_IMAGES, MAX_CAPTION_BYTES, OTHER_IMAGES, Group, members_by_key
from .fetched import BLANKS, is_caption, open_file, read_json
from .metadata import Source

PICTURES = frozenset((*JPEG_IMAGES, *OTHER_IMAGES, "jpe", "jfif", "heic", "heif", "jxl", "jp2", "svg", "ico", "psd"))
"""Endings of a picture's name. Some cannot be read; they are counted then, not overlooked."""
_CAPTIONS = ("txt", "json")
_MAX_CAPTION_FILE = 1 << 20
_ROWS_AT_ONCE = 4096

FILE = "own_file"
"""Column of a work list: size and time of the file that the picture is in, by which a later run knows it again."""
_FILE = (FILE, pa.struct([("bytes", pa.int64()), ("modified_ns", pa.int64())]))
_FILES = pa.schema(
    [("row", pa.int64()), ("path", pa.string()), ("caption", pa.string()), ("status", pa.string()),
     ("error_message", pa.string()), _FILE]
)  # fmt: skip
_MEMBER = pa.struct([("extension", pa.string()), ("offset", pa.int64()), ("size", pa.int64())])
_SAMPLES = pa.schema(
    [("row", pa.int64()), ("shard", pa.string()), ("source_key", pa.string()), ("caption", pa.string()),
     ("members", pa.list_(_MEMBER)), ("status", pa.string()), ("error_message", pa.string()), _FILE]
)  # fmt: skip


@dataclass
class Listing:
    """Rows to come, and what is known when they have come."""

    tables: Iterable[Any] = ()
    statuses: Counter[str] = field(default_factory=Counter[str])
    """Of rows whose picture will not be opened."""
    beside: int = 0
    """Pictures of a folder with a caption file of their name."""
    others: int = 0
    """Files that are neither picture nor caption by their names."""
    problems: dict[str, str] = field(default_factory=dict[str, str])
    """Shard -> what is wrong with it as a whole."""


@dataclass(frozen=True)
class Table:
    """A table of paths and captions: what to read of it, as `select.Source` asks."""

    path: Path
    path_column: str
    caption_column: str
    metadata: str = "Give a table of paths and captions"
    header: tuple[str, ...] = ()
    filter: str = ""
    needed: tuple[str, ...] = ("path", "caption")

    def candidates(self, name: str) -> tuple[str, ...]:
        return (self.path_column if name == "path" else self.caption_column,)

    def asked_by(self, name: str) -> str:
        return f"--{name}-column" if self.candidates(name) != (name,) else ""

    def remedy(self, missing: Mapping[str, str | None]) -> str:
        flags = " ".join(f"--{name}-column {near or 'ITS NAME'}" for name, near in missing.items())
        return f"Say what the table calls it: {flags}"


def holds_pictures(folder: Path) -> bool:
    """Returns whether files in a folder, or in a folder of it, are pictures by their names."""
    return any(path.suffix[1:].lower() in PICTURES for pattern in ("*", "*/*") for path in folder.glob(pattern))


def list_folder(root: Path) -> Listing:
    """Returns the pictures under a folder, in the order of their names.

    A picture's caption is in the file of its name ending in .txt, else in .json (the key `caption` or `text`). In a
    folder that has no such file at all, the folder's own name is the caption. Hidden files and folders are passed over.
    """
    listing = Listing()
    listing.tables = _tables(_folder_rows(root, listing), _FILES, listing)
    return listing


def list_table(table: Table) -> Listing:
    """Returns the rows of a table. Raises ValueError, in one line, where its columns or all files are missing."""
    listing = Listing()
    source = Source(table, [table.path])
    listing.tables = _tables(_table_rows(table, source), _FILES, listing)
    return listing


def list_shards(tars: Sequence[Path]) -> Listing:
    """Returns the samples of shards, in order; of a damaged shard, those before the damage."""
    listing = Listing()
    listing.tables = _tables(_shard_rows(tars, listing), _SAMPLES, listing)
    return listing


Row = dict[str, Any]


def _tables(rows: Iterable[Row], schema: Any, listing: Listing) -> Generator[Any]:
    waiting: list[Row] = []
    for number, row in enumerate(rows):
        if row["status"] is not None:
            listing.statuses[row["status"]] += 1
        waiting.append({"row": number, **row})
        if len(waiting) == _ROWS_AT_ONCE:
            yield pa.Table.from_pylist(waiting, schema)
            waiting = []
    if waiting:
        yield pa.Table.from_pylist(waiting, schema)


def _caption(content: bytes | None, reason: str | None = None) -> Row:
    """The columns that a caption's bytes give."""
    if content is None:
        return {"caption": None, "status": "no caption", "error_message": reason}
    try:
        text = content.decode().strip(BLANKS)
    except UnicodeDecodeError as error:
        shown = content[:MAX_CAPTION_BYTES].decode(errors="replace")
        return {"caption": shown, "status": "caption not UTF-8", "error_message": str(error)}
    if not text or text.isspace():
        return {"caption": text, "status": "no caption", "error_message": reason}
    if len(text.encode()) > MAX_CAPTION_BYTES:
        cut = text.encode()[:MAX_CAPTION_BYTES].decode(errors="ignore")
        return {"caption": cut, "status": "caption too long", "error_message": f"over {MAX_CAPTION_BYTES:,} bytes"}
    return {"caption": text, "status": None, "error_message": None}


def _file(path: str | Path) -> Row | None:
    """A file's size and time, or None where there is no such file."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None
    return {"bytes": found.st_size, "modified_ns": found.st_mtime_ns}


# A folder


def _folder_rows(root: Path, listing: Listing) -> Generator[Row]:
    for folder, names, files in os.walk(root, onerror=_refuse):
        names[:] = sorted(name for name in names if not name.startswith("."))
        # Links to folders are not followed: they may lead outside, or in circles.
        listing.others += sum(os.path.islink(os.path.join(folder, name)) for name in names)
        seen = sorted(name for name in files if not name.startswith("."))
        endings = {name: os.path.splitext(name)[1][1:].lower() for name in seen}
        pictures = [name for name in seen if endings[name] in PICTURES]
        stems = {os.path.splitext(name)[0] for name in pictures}
        beside: dict[str, dict[str, str]] = {}
        for name in seen:
            stem, ending = os.path.splitext(name)[0], endings[name]
            if ending in _CAPTIONS and stem in stems:
                beside.setdefault(stem, {})[ending] = os.path.join(folder, name)
            elif ending not in PICTURES:
                listing.others += 1
        relative = os.path.relpath(folder, root)
        called = "" if relative == "." else os.path.basename(folder).replace("_", " ")
        for name in pictures:
            path = os.path.normpath(os.path.join(relative, name))
            found = beside.get(os.path.splitext(name)[0], {})
            row = _caption(None, "no file of its name has one") if beside else _caption(_encoded(called))
            if found:
                listing.beside += 1
                row = _caption_beside(found)
            try:
                path.encode()
            except UnicodeEncodeError:
                path = path.encode(errors="surrogateescape").decode(errors="replace")
                row = {**row, "status": "bad path", "error_message": "its name is not UTF-8"}
            yield {"path": path, **row, FILE: _file(os.path.join(folder, name))}


def _encoded(name: str) -> bytes:
    return name.encode(errors="surrogateescape")


def _refuse(error: OSError) -> None:
    raise ValueError(f"{error.filename}: cannot be listed ({error.strerror}); mend that or move it away")


def _caption_beside(found: dict[str, str]) -> Row:
    try:
        if "txt" in found:
            return _caption(_read(found["txt"]))
        told = read_json(_read(found["json"]))
    except OSError as error:
        return _caption(None, f"its caption cannot be read ({error.strerror})")
    if not isinstance(told, dict):
        return _caption(None, "its .json is not valid")
    text: Any = told.get("caption") or told.get("text")
    if not isinstance(text, str):
        return _caption(None, "its .json has no caption and no text")
    return _caption(text.encode(errors="surrogatepass"))


def _read(path: str) -> bytes:
    with open_file(path) as file:
        return file.read(_MAX_CAPTION_FILE)


# A table


def _table_rows(table: Table, source: Source) -> Generator[Row]:
    base = table.path.resolve().parent
    looked = there = 0
    held: list[Row] = []
    for batch in source.batches():
        columns = [_bytes(batch.table[batch.columns[name]]) for name in ("path", "caption")]
        for path, caption in zip(*columns, strict=True):
            row = _path(path)
            if row["status"] is None:
                row |= {**_caption(caption), FILE: _file(base / row["path"])}
            if looked < _PROBED:
                looked += 1
                there += os.path.lexists(base / (row["path"] or ""))
                held.append(row)
                continue
            _check_found(there, looked, table, base)
            yield from held
            held = []
            yield row
    _check_found(there, looked, table, base)
    yield from held


_PROBED = 100


def _check_found(there: int, looked: int, table: Table, base: Path) -> None:
    if looked and not there:
        raise ValueError(
            f"{table.path}: none of its first {looked} files is there; paths that are not absolute start at {base}"
        )


def _bytes(column: Any) -> list[bytes | None]:
    array = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if not pa.types.is_binary(array.type):
        array = array.cast(pa.string(), safe=False).cast(pa.binary())
    return array.to_pylist()


def _path(content: bytes | None) -> Row:
    """The columns that a path gives. Where it leads is looked at when it is opened."""
    text = (content or b"").decode(errors="replace")
    row: Row = {"path": text.replace("\0", "\ufffd"), "caption": None, "status": None, "error_message": None}
    if not text.strip():
        return row | {"status": "bad path", "error_message": "it is empty"}
    if "\0" in text or text.encode() != content:
        return row | {"status": "bad path", "error_message": "not a name in UTF-8"}
    return row


# Shards


def _shard_rows(tars: Sequence[Path], listing: Listing) -> Generator[Row]:
    for path in tars:
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            whole = _file(path)
            try:
                groups, damage = members_by_key(view)
                if damage:
                    listing.problems[path.name] = damage
                for key, group in groups.items():
                    yield {"shard": path.name, "source_key": key, **_sample(group, view), FILE: whole}
            finally:
                if isinstance(view, mmap.mmap):
                    view.close()


def _sample(group: Group, view: mmap.mmap | bytes) -> Row:
    members = [{"extension": extension, "offset": member.offset, "size": member.size} for extension, member in group]
    if len({extension for extension, _ in group}) < len(group):
        twice = {"status": "two members of the same name", "error_message": None}
        return {"caption": None, "members": members, **twice}
    texts = [
        view[member.offset : member.offset + min(member.size, MAX_CAPTION_BYTES * 2)]
        for extension, member in sorted(group, key=lambda entry: (entry[0] != "txt", entry[1].offset))
        if extension == "txt" or extension.endswith(".txt")
    ]
    # The first that can be used; where none can, what is wrong with the first.
    usable = next((text for text in texts if is_caption(text)), texts[0] if texts else None)
    return {"members": members, **_caption(usable)}
