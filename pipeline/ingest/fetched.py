"""A work list's rows in, the bytes of their pictures out: from what img2dataset brought, from files, or from shards.

Whatever the source, accepting asks the same two questions: the bytes of a row, and, where there are none, why.
"""

import errno
import json
import mmap
import os
import stat
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import pyarrow.parquet as pq

from .. import tar
from ..scan import JPEG_IMAGES, MAX_IMAGE_BYTES, OTHER_IMAGES, members_by_key
from .fates import of_download

Row = Mapping[str, Any]
_MAX_JSON_BYTES = 1 << 20


class Missing(Exception):
    """There is no picture: its fate, and the reason in more words."""

    def __init__(self, fate: str, reason: str) -> None:
        super().__init__(reason)
        self.fate = fate


class Fetched(Protocol):
    """The pictures of a work list's rows."""

    def image(self, row: Row) -> bytes:
        """Returns a picture's bytes. Raises Missing."""
        ...

    def extras(self, row: Row) -> tuple[dict[str, bytes], dict[str, Any]]:
        """Returns further members of the sample, and what its json said already."""
        ...


@dataclass(frozen=True)
class Own:
    """Where the pictures of own data lie. Travels to another process."""

    root: Path
    """Resolved. Nothing outside it is opened."""
    base: Path
    """What relative paths start from."""
    is_shards: bool = False


@contextmanager
def opened(staged: Path | None, cut: Mapping[str, str], own: Own | None) -> Generator[Fetched]:
    """Gives the pictures of one work list."""
    if own is None:
        with _staged(staged, cut) as fetched:
            yield fetched
    elif own.is_shards:
        with ExitStack() as stack:
            yield _Shards(own, stack)
    else:
        yield _Files(own)


@dataclass(frozen=True)
class _Staged:
    """What img2dataset downloaded."""

    said: Mapping[int, str | None] = field(default_factory=dict[int, str | None])
    images: Mapping[int, memoryview] = field(default_factory=dict[int, memoryview])
    cut: Mapping[str, str] = field(default_factory=dict[str, str])
    """URL -> why the proxy broke its answer off."""

    def image(self, row: Row) -> bytes:
        if (image := self.images.get(row["row"])) is not None:
            return bytes(image)
        if error := self.said.get(row["row"]):
            raise Missing(of_download(error, self.cut.get(row["url"])), error)
        raise Missing("lost", "img2dataset left the row out")

    def extras(self, row: Row) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {}, {}


@contextmanager
def _staged(stem: Path | None, cut: Mapping[str, str]) -> Generator[_Staged]:
    if stem is None:
        yield _Staged()
        return
    columns = pq.read_table(stem.with_suffix(".parquet"), columns=["row", "key", "error_message"]).to_pydict()
    said = dict(zip(columns["row"], columns["error_message"], strict=True))
    rows = dict(zip(columns["key"], columns["row"], strict=True))
    path = stem.with_suffix(".tar")
    with path.open("rb") as file:
        if not path.stat().st_size:
            yield _Staged(said, {}, cut)
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            groups, _ = members_by_key(mapped)
            found: dict[int, tar.Member] = {
                rows[key]: member for key, group in groups.items() for extension, member in group if extension == "jpg"
            }
            view = memoryview(mapped)
            images = {row: view[member.offset : member.offset + member.size] for row, member in found.items()}
            try:
                yield _Staged(said, images, cut)
            finally:
                for image in images.values():
                    image.release()
                view.release()


class _Files:
    """Pictures in a folder. A path that leads out of it, by `..`, by its name or by a link, is not opened."""

    def __init__(self, own: Own) -> None:
        self._own = own

    def image(self, row: Row) -> bytes:
        path = Path(os.path.realpath(self._own.base / row["path"]))
        if not path.is_relative_to(self._own.root):
            raise Missing("outside the folder", f"it leads to {path}")
        try:
            with open_file(path) as file:
                if (size := os.fstat(file.fileno()).st_size) > MAX_IMAGE_BYTES:
                    raise Missing("too large", f"{size:,} bytes")
                return file.read(MAX_IMAGE_BYTES + 1)
        except (FileNotFoundError, NotADirectoryError):
            raise Missing("no such file", f"{path} is not there") from None
        except OSError as error:
            raise Missing("cannot be read", str(error)) from None

    def extras(self, row: Row) -> tuple[dict[str, bytes], dict[str, Any]]:
        return {}, {}


class _Shards:
    """Samples of other shards, whose members the work list names by their place."""

    def __init__(self, own: Own, stack: ExitStack) -> None:
        self._own = own
        self._stack = stack
        self._views: dict[str, mmap.mmap] = {}

    def image(self, row: Row) -> bytes:
        member = next(
            (found for name in (*JPEG_IMAGES, *OTHER_IMAGES) if (found := self._member(row, name)) is not None), None
        )
        if member is None:
            raise Missing("no image", "no member of the sample is a picture")
        if member["size"] > MAX_IMAGE_BYTES:
            raise Missing("too large", f"{member['size']:,} bytes")
        return self._read(row, member)

    def extras(self, row: Row) -> tuple[dict[str, bytes], dict[str, Any]]:
        members: dict[str, bytes] = {}
        for member in row["members"]:
            extension = member["extension"]
            if extension in (*JPEG_IMAGES, *OTHER_IMAGES, "txt", "json"):
                continue
            content = self._read(row, member)
            if not extension.endswith(".txt") or is_caption(content):
                members[extension] = content
        details: Any = None
        member = self._member(row, "json")
        if member is not None and member["size"] <= _MAX_JSON_BYTES:
            details = read_json(self._read(row, member))
        return members, details if isinstance(details, dict) else {}

    @staticmethod
    def _member(row: Row, extension: str) -> Mapping[str, Any] | None:
        return next((member for member in row["members"] if member["extension"] == extension), None)

    def _read(self, row: Row, member: Mapping[str, Any]) -> bytes:
        name = row["shard"]
        if (view := self._views.get(name)) is None:
            file = self._stack.enter_context((self._own.root / name).open("rb"))
            view = self._stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            self._views[name] = view
        content = view[member["offset"] : member["offset"] + member["size"]]
        if len(content) < member["size"]:
            raise OSError(f"{self._own.root / name} is shorter than when it was listed; start with another --out")
        return content


def open_file(path: str | Path) -> BinaryIO:
    """Returns a regular file, open. Raises OSError for anything else: a pipe would keep its reader waiting."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(content: bytes) -> Any:
    """Returns the value of a JSON text, or None where it is none; what JSON has not (NaN) becomes None."""
    try:
        return json.loads(content, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None


def is_caption(content: bytes) -> bool:
    """Returns whether bytes are a text that is not blank."""
    try:
        return bool(content.decode().strip(BLANKS))
    except UnicodeDecodeError:
        return False


BLANKS = " \t\r\n\0\ufeff"
