"""Ways in which a JPEG is damaged, each of the file's own size; and some images of a shard set damaged so."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.index import Index

Rng = np.random.Generator


def _scan(jpeg: bytes) -> int:
    """Where the entropy-coded data begin."""
    at = 2
    while True:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        if jpeg[at + 1] == 0xDA:
            return end
        at = end


def _filled(start: bytes, size: int) -> bytes:
    return start[:size] + bytes(max(0, size - len(start)))


def truncated(jpeg: bytes, rng: Rng) -> bytes:
    """Cut somewhere in its scan; the rest of its place in the shard is zeros."""
    return _filled(jpeg[: int(rng.integers(_scan(jpeg), len(jpeg) - 2))], len(jpeg))


def html(jpeg: bytes, rng: Rng) -> bytes:
    """What a server answered instead."""
    return _filled(b"<!DOCTYPE html><title>404 Not Found</title>", len(jpeg))


def noise(jpeg: bytes, rng: Rng) -> bytes:
    """A scan of random bytes between a good header and the end mark."""
    start = _scan(jpeg)
    return jpeg[:start] + rng.bytes(len(jpeg) - start - 2) + jpeg[-2:]


def zeroed(jpeg: bytes, rng: Rng) -> bytes:
    """The second half of the scan is zeros, but for the end mark: both decoders read past that, so it stays usable."""
    start = (_scan(jpeg) + len(jpeg)) // 2
    return jpeg[:start] + bytes(len(jpeg) - start - 2) + jpeg[-2:]


def lost_sector(jpeg: bytes, rng: Rng) -> bytes:
    """512 bytes, anywhere, are of another file."""
    at = int(rng.integers(2, len(jpeg) - 2))
    end = min(at + 512, len(jpeg))
    return jpeg[:at] + rng.bytes(end - at) + jpeg[end:]


def wrong_table(jpeg: bytes, rng: Rng) -> bytes:
    """A component asks for a quantisation table that is not there."""
    at = max(jpeg.find(b"\xff\xc0"), jpeg.find(b"\xff\xc2")) + 12
    return jpeg[:at] + b"\x03" + jpeg[at + 1 :]


def missing_table(jpeg: bytes, rng: Rng) -> bytes:
    """The first quantisation table's segment is a comment."""
    at = jpeg.find(b"\xff\xdb")
    return jpeg[: at + 1] + b"\xfe" + jpeg[at + 2 :]


def flipped(jpeg: bytes, rng: Rng) -> bytes:
    """Twenty wrong bytes in the scan."""
    content = bytearray(jpeg)
    content_at = rng.integers(_scan(jpeg), len(jpeg) - 2, 20)
    for at, value in zip(content_at.tolist(), rng.bytes(20), strict=True):
        content[at] = value
    return bytes(content)


DAMAGES: tuple[Callable[[bytes, Rng], bytes], ...] = (
    truncated,
    html,
    noise,
    zeroed,
    lost_sector,
    wrong_table,
    missing_table,
    flipped,
)
"""Each keeps the size of the file, as damage on a disk does."""


def damage_images(index: Index, folder: Path, share: float) -> int:
    """Damages that share of the images of a copy of the index's shards, each way equally often; returns how many."""
    rng = np.random.default_rng(0)
    chosen = rng.permutation(index.usable_ids())[: max(len(DAMAGES), round(index.num_usable * share))]
    for number, sample in enumerate(chosen.tolist()):
        shard, row = index.locate(sample)
        rows = index.rows(shard)
        offset, size = int(rows.image_offset[row]), int(rows.image_bytes[row])
        with (folder / Path(index.shards[shard].path).name).open("r+b") as file:
            file.seek(offset)
            damaged = DAMAGES[number % len(DAMAGES)](file.read(size), rng)
            assert len(damaged) == size, "damage keeps the size"
            file.seek(offset)
            file.write(damaged)
    return len(chosen)
