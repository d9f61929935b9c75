"""Slots of a batch in, the bytes of their images and captions out: one positional read each, then cheap checks.

A sample whose bytes are not what the index saw becomes a fault, never an exception; a read that the disk refuses is
tried again and then stops the run, since leaving it out would make a resumed run differ. About 10 us a sample.
"""

import errno
import functools
import os
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .index import Index, IntArray
from .order import Slots

_READ_ATTEMPTS = 4
_SHORTER = "shard shorter than its index"


@dataclass(frozen=True)
class Rows:
    """Where the samples of a batch stand. Each column: [batch]."""

    shard: IntArray
    row: IntArray
    sample_ids: IntArray
    image_offset: IntArray
    image_bytes: IntArray
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    caption_first: IntArray
    """Of the shard's captions, the sample's first."""
    num_captions: IntArray


class ReadFailed(ValueError):
    """The store did not give the bytes after several tries. Never a bad sample."""


class Reader:
    """Reads samples of an index. Safe for many threads; keeps a bounded number of shards open."""

    def __init__(self, index: Index, max_open: int = 256) -> None:
        self.index = index
        self._open = functools.lru_cache(maxsize=max_open)(_Shard)

    def locate(self, slots: Slots) -> Rows:
        """Returns the rows of slots that name samples by (shard, ordinal of its usable ones)."""
        row = np.empty_like(slots.ordinal)
        for shard in np.unique(slots.shard):
            here = slots.shard == shard
            row[here] = self.index.rows(int(shard)).usable[slots.ordinal[here]]
        return self._rows(slots.shard, row)

    def locate_ids(self, sample_ids: IntArray) -> Rows:
        """Returns the rows of samples named by their ids; int64 [batch]."""
        shard = np.searchsorted(self.index.first_ids, sample_ids, "right").astype(np.int64) - 1
        return self._rows(shard, sample_ids - self.index.first_ids[shard])

    def images(self, rows: Rows) -> list[bytes | str]:
        """Returns the JPEG of each row, or the reason why it cannot be used."""
        jpegs: list[bytes | str] = []
        for shard, offset, size in zip(
            rows.shard.tolist(), rows.image_offset.tolist(), rows.image_bytes.tolist(), strict=True
        ):
            jpeg = self._read(shard, offset, size)
            if len(jpeg) != size:
                jpegs.append(_SHORTER)
            elif jpeg[:3] != b"\xff\xd8\xff":
                jpegs.append("shard changed since it was indexed")
            else:
                jpegs.append(jpeg)
        return jpegs

    def captions(self, rows: Rows, choice: IntArray) -> list[bytes | str]:
        """Returns one caption a row, or the reason why it cannot be used.

        choice: int64 [batch], which of its captions, 0 <= choice < num_captions.
        """
        captions: list[bytes | str] = []
        at = (rows.caption_first + choice).tolist()
        for shard, caption in zip(rows.shard.tolist(), at, strict=True):
            columns = self.index.rows(shard)
            size = int(columns.caption_bytes[caption])
            text = self._read(shard, int(columns.caption_offset[caption]), size)
            captions.append(text if len(text) == size else _SHORTER)
        return captions

    def key(self, shard: int, row: int) -> str:
        return self.index.rows(shard).keys[row]

    def _rows(self, shard: IntArray, row: IntArray) -> Rows:
        names = ("image_offset", "image_bytes", "width", "height")
        found = {name: np.empty(len(row), np.int64) for name in (*names, "caption_first", "num_captions")}
        for each in np.unique(shard):
            here = shard == each
            columns, rows = self.index.rows(int(each)), row[here]
            for name in names:
                found[name][here] = getattr(columns, name)[rows]
            found["caption_first"][here] = columns.caption_first[rows]
            found["num_captions"][here] = columns.caption_first[rows + 1] - columns.caption_first[rows]
        return Rows(
            shard=shard,
            row=row,
            sample_ids=self.index.first_ids[shard] + row,
            image_offset=found["image_offset"],
            image_bytes=found["image_bytes"],
            width=found["width"].astype(np.int32),
            height=found["height"].astype(np.int32),
            caption_first=found["caption_first"],
            num_captions=found["num_captions"],
        )

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.index.shards[shard].path
        for attempt in range(_READ_ATTEMPTS):
            try:
                # Held in a name until the read is done: an evicted shard closes when nobody holds it.
                shard_file = self._open(path)
                return _read_fully(shard_file.descriptor, size, offset)
            except OSError as error:
                if attempt == _READ_ATTEMPTS - 1 or error.errno == errno.ENOENT:
                    raise ReadFailed(
                        f"{path}: cannot be read ({error.strerror or error}); bring it back and run the same command"
                    ) from None
                time.sleep(0.1 * 4**attempt)
        raise AssertionError("unreachable")


def _read_fully(descriptor: int, size: int, offset: int) -> bytes:
    """Reads until `size` bytes are there or the file ends; network file systems may give less at a time."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content


class _Shard:
    """An open file that closes when its last reader lets go: evicting one never pulls it from under a read."""

    def __init__(self, path: str) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
