"""One shard in, one Arrow row a sample out: where its bytes stand, its size, and why it is rejected if it is.

Reads tar headers and the heads and tails of the images, and decodes nothing. About 60 us a sample.
"""

import hashlib
import json
import mmap
import os
import stat
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import simplejpeg

from . import tar
from .jpeg import damage
from .sources import Shard, shard_name

MAX_IMAGE_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
"""A decoded image of more would take over 192 MB; such files are nearly always bombs or scans."""
MIN_SIDE = 8
MAX_ASPECT = 20
MAX_CAPTION_BYTES = 8192
"""Longer captions are cut here before they are read: no text encoder sees more than a few hundred bytes."""
MAX_MEMBERS = 400_000
"""Of one shard; beyond, its samples are left out. Shards have 30,000; each member costs memory while one is read."""
_ROWS_AT_ONCE = 1000
EOI_TAIL = 64
"""How far from the end the end mark may stand: some writers pad."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image_offset", pa.int64()),
        ("image_bytes", pa.int32()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("caption_offset", pa.list_(pa.int64())),
        ("caption_bytes", pa.list_(pa.int32())),
        ("class_id", pa.int32()),
        ("reason", pa.string()),
    ]
)


Group = list[tuple[str, tar.Member]]
"""(lower-case extension, member) of one sample, in the order of the shard."""


@dataclass(frozen=True)
class ShardInfo:
    """What is known of a shard without reading its rows."""

    path: str
    """Of a local file, or the URL."""
    shard_bytes: int
    identity: str
    samples: int
    usable: int
    digest: str
    """sha256 of its rows."""
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    """Reason -> samples."""
    problem: str | None = None
    """Why the shard could not be read to its end."""

    @property
    def name(self) -> str:
        return shard_name(self.path)


def index_shard(shard: Shard, descriptor: int, max_members: int = MAX_MEMBERS) -> tuple[Any, ShardInfo]:
    """Returns the rows of one shard, an Arrow table of SCHEMA, and what to know of it.

    Damage costs the samples behind it, never more. Raises OSError where the file cannot be read.
    """
    status = os.fstat(descriptor)
    readable = stat.S_ISREG(status.st_mode) and status.st_size > 0  # an empty file cannot be mapped
    view = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) if readable else b""
    groups, problem = members_by_key(view, max_members) if stat.S_ISREG(status.st_mode) else ({}, "not a file")
    batches: list[Any] = []
    reasons: dict[str, int] = {}
    digest = hashlib.sha256(f"[{json.dumps(shard.name)},[".encode())
    # A thousand at a time: rows as Python objects take ten times what they take in Arrow.
    waiting = iter(groups.items())
    for start in range(0, len(groups), _ROWS_AT_ONCE):
        rows = [_row(key, group, view) for key, group in islice(waiting, _ROWS_AT_ONCE)]
        digest.update((("," if start else "") + json.dumps(rows, separators=(",", ":"))[1:-1]).encode())
        batches.append(pa.RecordBatch.from_pylist(rows, SCHEMA))
        for row in rows:
            if (reason := row["reason"]) is not None:
                reasons[reason] = reasons.get(reason, 0) + 1
    digest.update(b"]]")
    if isinstance(view, mmap.mmap):
        view.close()
    table = pa.Table.from_batches(batches, SCHEMA).combine_chunks()
    usable = len(groups) - sum(reasons.values())
    info = ShardInfo(
        shard.path, shard.shard_bytes, shard.identity, len(groups), usable, digest.hexdigest(), reasons, problem
    )
    return table, info


def members_by_key(view: mmap.mmap | bytes, max_members: int = MAX_MEMBERS) -> tuple[dict[str, Group], str | None]:
    """Returns the members of each sample of a tar, up to the damage if there is any; and what is damaged.

    Members without an extension belong to no sample, for the webdataset library and for us alike.
    """
    groups: dict[str, Group] = {}
    try:
        for count, member in enumerate(tar.members(view)):
            if count == max_members:
                raise tar.Damaged(f"more than {max_members:,} members")
            key, extension = split_name(member.name)
            if extension:
                groups.setdefault(key, []).append((extension, member))
    except tar.Damaged as damage:
        return groups, str(damage)
    return groups, None


def split_name(name: str) -> tuple[str, str]:
    """The (key, extension) of a member, as webdataset splits them: at the first dot of the file's own name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


JPEG_IMAGES = ("jpg", "jpeg")
OTHER_IMAGES = ("png", "webp", "gif", "bmp", "avif", "tif", "tiff")


def _row(key: str, group: Group, view: mmap.mmap | bytes) -> dict[str, Any]:
    by_extension: dict[str, tar.Member] = {}
    reason: str | None = None
    for extension, member in group:
        if extension in by_extension:
            reason = "two members of the same name"
        by_extension.setdefault(extension, member)
    image = next((by_extension[name] for name in JPEG_IMAGES if name in by_extension), None)
    texts = [
        (member.offset, min(member.size, MAX_CAPTION_BYTES))
        for extension, member in sorted(by_extension.items(), key=lambda entry: (entry[0] != "txt", entry[1].offset))
        if extension == "txt" or extension.endswith(".txt")
    ]
    captions = [(offset, size) for offset, size in texts if view[offset : offset + size].strip(b" \t\r\n\0")]
    width = height = 0
    if image is None:
        other = next((name for name in OTHER_IMAGES if name in by_extension), None)
        reason = reason or (f"image is {other}, not JPEG" if other else "no image")
    elif image.size > MAX_IMAGE_BYTES:
        reason = reason or f"image file over {MAX_IMAGE_BYTES >> 20} MiB"
    else:
        height, width, fault = _inspect(memoryview(view)[image.offset : image.offset + image.size])
        reason = reason or fault
    if not captions:
        reason = reason or ("empty caption" if texts else "no caption")
    label = by_extension.get("cls")
    return {
        "key": key,
        "image_offset": image.offset if image else 0,
        "image_bytes": min(image.size, 2**31 - 1) if image else 0,
        "width": width,
        "height": height,
        "caption_offset": [offset for offset, _ in captions],
        "caption_bytes": [size for _, size in captions],
        "class_id": _class_id(view[label.offset : label.offset + min(label.size, 16)]) if label else None,
        "reason": reason,
    }


def _inspect(jpeg: memoryview) -> tuple[int, int, str | None]:
    """The (height, width, why not) of an image, from its head and its tail."""
    if bytes(jpeg[:3]) != b"\xff\xd8\xff":
        return 0, 0, "not a JPEG" if len(jpeg) else "empty image"
    try:
        header: tuple[Any, ...] = simplejpeg.decode_jpeg_header(jpeg, strict=False)
    except Exception:  # simplejpeg raises ValueError, and KeyError for what libjpeg does not know
        return 0, 0, "damaged JPEG header"
    height, width, colours = int(header[0]), int(header[1]), header[2]
    if colours not in ("YCbCr", "Gray", "RGB"):
        return height, width, f"JPEG in {colours}"
    if width * height > MAX_PIXELS:
        return height, width, f"over {MAX_PIXELS // 1_000_000} megapixels"
    if min(width, height) < MIN_SIDE:
        return height, width, f"a side under {MIN_SIDE} pixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return height, width, f"longer than {MAX_ASPECT} times its width"
    if b"\xff\xd9" not in bytes(jpeg[-EOI_TAIL:]):
        return height, width, "JPEG cut off"
    return height, width, damage(jpeg)


def _class_id(text: bytes) -> int | None:
    return number if text.strip().isdigit() and (number := int(text)) < 2**31 else None
