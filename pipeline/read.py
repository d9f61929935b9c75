"""Slots of a batch in, the bytes of their images and captions out: one positional read each, then cheap checks.

A sample whose bytes are not what the index saw becomes a fault, never an exception; a read that the disk refuses is
tried again and then stops the run, since leaving it out would make a resumed run differ. About 10 us a sample.
"""

import errno
import functools
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from .cache import OpenFile
from .index import ROW, Index, IntArray
from .order import Slots
from .scan import EOI_TAIL
from .store import ReadFailed

__all__ = ["ReadFailed", "Reader", "Rows"]

Result = TypeVar("Result")

_READ_ATTEMPTS = 4
_SHORTER = "shard shorter than its index"


@dataclass(frozen=True)
class Rows:
    """Where the samples of a batch stand. Each column: [batch]."""

    shard: IntArray
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
        self._warned = False

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
            self._bring(np.unique(shards).tolist())

    def images(self, rows: Rows) -> list[bytes | str]:
        """Returns the JPEG of each row, or the reason why it cannot be used. Raises ReadFailed."""
        jpegs: list[bytes | str] = []
        contents = self._contents(rows.shard, rows.image_offset, rows.image_bytes)
        for jpeg, size in zip(contents, rows.image_bytes.tolist(), strict=True):
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
        contents = self._contents(rows.shard, offsets, sizes)
        return [text if len(text) == size else _SHORTER for text, size in zip(contents, sizes.tolist(), strict=True)]

    def key(self, shard: int, row: int) -> str:
        return self.index.rows(shard).keys[row]

    def _rows(self, shard: IntArray, row: IntArray) -> Rows:
        samples = np.empty(len(row), ROW)
        for each, here in _by_shard(shard):
            samples[here] = self.index.rows(each).samples[row[here]]
        return Rows(
            shard=shard,
            sample_ids=self.index.first_ids[shard] + row,
            image_offset=samples["image_offset"].copy(),
            image_bytes=samples["image_bytes"].astype(np.int64),
            width=samples["width"].copy(),
            height=samples["height"].copy(),
            caption_first=samples["caption_first"].astype(np.int64),
            num_captions=samples["num_captions"].astype(np.int64),
        )

    def _contents(self, shards: IntArray, offsets: IntArray, sizes: IntArray) -> list[bytes]:
        """Returns bytes [offset, offset + size) of each shard, fewer where it ends before. Each argument: [batch]."""
        order = np.argsort(shards, kind="stable")
        sorted_shards = shards[order].tolist()
        arriving = self._bring(list(dict.fromkeys(sorted_shards))) if self.index.remote else {}
        contents = [b""] * len(sorted_shards)
        opened, path, shard_file = -1, "", None
        for at, shard, offset, size in zip(
            order.tolist(), sorted_shards, offsets[order].tolist(), sizes[order].tolist(), strict=True
        ):
            if shard != opened:
                # One shard at a time, let go before the next: a cache need not hold all that a batch reads from.
                opened, path, shard_file = shard, self.index.shards[shard].path, None
                if shard in arriving:
                    arriving[shard].result()
                shard_file = _patiently(path, self._opened, shard)
            assert shard_file is not None
            contents[at] = _patiently(path, _read_fully, shard_file.descriptor, size, offset)
        return contents

    def _opened(self, shard: int) -> OpenFile:
        info = self.index.shards[shard]
        if "://" in info.path:
            return self.index.store.open(info.path, info.shard_bytes, info.identity)
        return self._open(info.path)

    def _bring(self, shards: list[int]) -> dict[int, "Future[None]"]:
        """Starts to fetch those of a batch's shards that are remote. Does nothing where the cache cannot hold them
        all: they would push each other out, unread."""
        store = self.index.store
        infos = {shard: info for shard in shards if "://" in (info := self.index.shards[shard]).path}
        total, limit = sum(info.shard_bytes for info in infos.values()), store.limits.cache_bytes
        if total > limit:
            if not self._warned:
                self._warned = True
                print(
                    f"{store.limits.cache_folder}: a batch reads from {len(infos)} shards of {total:,} bytes in all, "
                    f"more than its {limit:,}, so each batch fetches its shards anew; raise SHORTCLIP_CACHE_GB",
                    file=sys.stderr,
                )
            return {}
        futures = store.bring((info.path, info.shard_bytes, info.identity) for info in infos.values())
        return dict(zip(infos, futures, strict=True))


def _patiently(path: str, read: Callable[..., Result], *arguments: Any) -> Result:
    """What `read` returns, after some tries: network file systems fail for a moment. Raises ReadFailed."""
    for attempt in range(_READ_ATTEMPTS):
        try:
            return read(*arguments)
        except OSError as error:
            if attempt == _READ_ATTEMPTS - 1 or error.errno == errno.ENOENT:
                raise ReadFailed(
                    f"{path}: cannot be read ({error.strerror or error}); bring it back and run the same command"
                ) from None
            time.sleep(0.1 * 4**attempt)
    raise AssertionError("unreachable")


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
