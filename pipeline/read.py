"""Slots of a batch in, the bytes of their images and captions out: one positional read each, then cheap checks.

A sample whose bytes are not what the index saw becomes a fault, never an exception; a read that the disk refuses is
tried again and then stops the run, since leaving it out would make a resumed run differ. About 10 us a sample.
"""

import errno
import functools
import itertools
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .cache import OpenFile
from .index import ROW, Index, IntArray
from .order import Slots
from .scan import EOI_TAIL
from .store import ReadFailed

__all__ = ["ReadFailed", "Reader", "Rows"]

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


class Reader:
    """Reads samples of an index. Safe for many threads; keeps a bounded number of shards open."""

    def __init__(self, index: Index, max_open: int = 256) -> None:
        self.index = index
        self._open = functools.lru_cache(maxsize=max_open)(_open_file)

    def locate(self, slots: Slots) -> Rows:
        """Returns the rows of slots that name samples by (shard, ordinal of its usable ones)."""
        row = np.empty_like(slots.ordinal)
        for shard, here in _by_shard(slots.shard):
            row[here] = self.index.rows(shard).usable[slots.ordinal[here]]
        return self._rows(slots.shard, row)

    def locate_ids(self, sample_ids: IntArray) -> Rows:
        """Returns the rows of samples named by their ids; int64 [batch]."""
        shard = np.searchsorted(self.index.first_ids, sample_ids, "right").astype(np.int64) - 1
        return self._rows(shard, sample_ids - self.index.first_ids[shard])

    def prefetch(self, shards: IntArray) -> None:
        """Starts to fetch what of these shards is remote and not here; for those of batches to come."""
        if self.index.remote:
            self._bring(shards)

    def images(self, rows: Rows) -> list[bytes | str]:
        """Returns the JPEG of each row, or the reason why it cannot be used. Raises ReadFailed."""
        if self.index.remote:
            for shard in self._bring(rows.shard):
                shard.result()
        jpegs: list[bytes | str] = []
        for shard, offset, size in zip(
            rows.shard.tolist(), rows.image_offset.tolist(), rows.image_bytes.tolist(), strict=True
        ):
            jpeg = self._read(shard, offset, size)
            if len(jpeg) != size:
                jpegs.append(_SHORTER)
            elif jpeg[:3] != b"\xff\xd8\xff" or b"\xff\xd9" not in jpeg[-EOI_TAIL:]:
                jpegs.append("shard changed since it was indexed")
            else:
                jpegs.append(jpeg)
        return jpegs

    def captions(self, rows: Rows, choice: IntArray) -> list[bytes | str]:
        """Returns one caption a row, or the reason why it cannot be used.

        choice: int64 [batch], which of its captions, 0 <= choice < num_captions.
        """
        at = rows.caption_first + choice
        offsets, sizes = np.empty_like(at), np.empty_like(at)
        for shard, here in _by_shard(rows.shard):
            columns = self.index.rows(shard)
            offsets[here], sizes[here] = columns.caption_offset[at[here]], columns.caption_bytes[at[here]]
        captions: list[bytes | str] = []
        for shard, offset, size in zip(rows.shard.tolist(), offsets.tolist(), sizes.tolist(), strict=True):
            text = self._read(shard, offset, size)
            captions.append(text if len(text) == size else _SHORTER)
        return captions

    def key(self, shard: int, row: int) -> str:
        return self.index.rows(shard).keys[row]

    def _rows(self, shard: IntArray, row: IntArray) -> Rows:
        samples = np.empty(len(row), ROW)
        for each, here in _by_shard(shard):
            samples[here] = self.index.rows(each).samples[row[here]]
        return Rows(
            shard=shard,
            row=row,
            sample_ids=self.index.first_ids[shard] + row,
            image_offset=samples["image_offset"].copy(),
            image_bytes=samples["image_bytes"].astype(np.int64),
            width=samples["width"].copy(),
            height=samples["height"].copy(),
            caption_first=samples["caption_first"].astype(np.int64),
            num_captions=samples["num_captions"].astype(np.int64),
        )

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        path = self.index.shards[shard].path
        for attempt in range(_READ_ATTEMPTS):
            try:
                # Held in a name until the read is done: an evicted shard closes when nobody holds it.
                shard_file = self._remote(shard) if "://" in path else self._open(path)
                return _read_fully(shard_file.descriptor, size, offset)
            except OSError as error:
                if attempt == _READ_ATTEMPTS - 1 or error.errno == errno.ENOENT:
                    raise ReadFailed(
                        f"{path}: cannot be read ({error.strerror or error}); bring it back and run the same command"
                    ) from None
                time.sleep(0.1 * 4**attempt)
        raise AssertionError("unreachable")

    def _remote(self, shard: int) -> OpenFile:
        info = self.index.shards[shard]
        return self.index.store.open(info.path, info.shard_bytes, info.identity)

    def _bring(self, shards: IntArray) -> list["Future[OpenFile]"]:
        infos = [self.index.shards[shard] for shard in np.unique(shards).tolist()]
        missing = [
            info for info in infos if "://" in info.path and not self.index.store.holds(info.path, info.identity)
        ]
        return self.index.store.bring((info.path, info.shard_bytes, info.identity) for info in missing)


def _by_shard(shard: IntArray) -> Iterator[tuple[int, IntArray]]:
    """Yields (shard, where in the batch it stands). A batch may read from hundreds: sorted once, not searched often."""
    order = np.argsort(shard, kind="stable")
    found = shard[order]
    bounds = [0, *(np.flatnonzero(np.diff(found)) + 1).tolist(), len(found)]
    for start, stop in itertools.pairwise(bounds):
        if stop > start:
            yield int(found[start]), order[start:stop]


def _read_fully(descriptor: int, size: int, offset: int) -> bytes:
    """Reads until `size` bytes are there or the file ends; network file systems may give less at a time."""
    content = os.pread(descriptor, size, offset)
    while len(content) < size and (more := os.pread(descriptor, size - len(content), offset + len(content))):
        content += more
    return content


def _open_file(path: str) -> OpenFile:
    return OpenFile(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
