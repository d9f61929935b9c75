"""Shards in, one Arrow row a sample out: where its bytes stand, its size, and why it is rejected if it is.

Built once from tar headers and the heads and tails of the images, kept as `_index.parquet` beside the shards (in a
cache folder where those are read-only), one row group a shard, read when a batch needs that shard. Captions stay in
the shards. Building costs about 40 us a sample, an open index about 1 KB a shard plus the shards in use.
"""

import contextlib
import functools
import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from tqdm import tqdm

from . import tar

INDEX_NAME = "_index.parquet"
VERSION = 1
"""Raise it when the same shards give other rows: older files are built anew."""

MAX_IMAGE_BYTES = 64 << 20
MAX_PIXELS = 64_000_000
"""A decoded image of more would take over 192 MB; such files are nearly always bombs or scans."""
MIN_SIDE = 8
MAX_ASPECT = 20
MAX_CAPTION_BYTES = 8192
"""Longer captions are cut here before they are read: no text encoder sees more than a few hundred bytes."""
_EOI_TAIL = 64
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

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ShardInfo:
    """What is known of a shard without reading its rows."""

    path: str
    shard_bytes: int
    mtime_ns: int
    samples: int
    usable: int
    digest: str
    """sha256 of its rows."""
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    """Reason -> samples."""
    problem: str | None = None
    """Why the shard could not be read to its end."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard, as columns."""

    keys: list[str]
    usable: IntArray
    """Rows that can be trained on."""
    image_offset: IntArray
    image_bytes: IntArray
    width: npt.NDArray[np.int32]
    height: npt.NDArray[np.int32]
    caption_first: IntArray
    """Row r's captions are [caption_first[r], caption_first[r + 1]) of the next two."""
    caption_offset: IntArray
    caption_bytes: IntArray
    class_id: npt.NDArray[np.int32]
    """-1 where the sample has none."""


class Index:
    """The samples of one or more shard sets. A sample's id is its row, counted over all shards in order."""

    def __init__(self, shards: Sequence[ShardInfo], parquet_of: Sequence[tuple[Path, int]]) -> None:
        """parquet_of: for each shard, the index file and the row group that holds its rows."""
        self.shards = tuple(shards)
        self._parquet_of = tuple(parquet_of)
        self.shard_sizes: IntArray = np.array([shard.usable for shard in shards], np.int64)
        self.first_ids: IntArray = np.concatenate([[0], np.cumsum([shard.samples for shard in shards])]).astype(
            np.int64
        )
        self.num_samples = int(self.first_ids[-1])
        self.num_usable = int(self.shard_sizes.sum())
        self.rows = functools.lru_cache(maxsize=512)(self._read_rows)

    @property
    def digest(self) -> str:
        """sha256 over the rows of all shards in order: what resume compares."""
        return hashlib.sha256("".join(shard.digest for shard in self.shards).encode()).hexdigest()

    @property
    def rejected(self) -> dict[str, int]:
        """Reason -> samples left out when the index was built."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            for reason, count in shard.rejected.items():
                counts[reason] = counts.get(reason, 0) + count
        return dict(sorted(counts.items()))

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Returns the (shard, row in it) of a sample id."""
        shard = int(np.searchsorted(self.first_ids, sample_id, "right")) - 1
        return shard, sample_id - int(self.first_ids[shard])

    def usable_ids(self) -> IntArray:
        """Returns the ids of all usable samples in order, int64 [num_usable]; for evaluation sets."""
        return np.concatenate([self.first_ids[i] + self.rows(i).usable for i in range(len(self.shards))])

    def _read_rows(self, shard: int) -> ShardRows:
        path, group = self._parquet_of[shard]
        table = pq.ParquetFile(path).read_row_group(group)
        captions = table["caption_offset"].combine_chunks()
        usable = np.flatnonzero(table["reason"].is_null().to_numpy())
        return ShardRows(
            keys=table["key"].to_pylist(),
            usable=usable.astype(np.int64),
            image_offset=table["image_offset"].to_numpy(),
            image_bytes=table["image_bytes"].to_numpy().astype(np.int64),
            width=table["width"].to_numpy(),
            height=table["height"].to_numpy(),
            caption_first=np.concatenate([[0], np.cumsum(captions.value_lengths().to_numpy(zero_copy_only=False))]),
            caption_offset=captions.flatten().to_numpy(),
            caption_bytes=table["caption_bytes"].combine_chunks().flatten().to_numpy().astype(np.int64),
            class_id=table["class_id"].fill_null(-1).to_numpy(),
        )


def open_index(folders: Sequence[Path], progress: bool = True) -> Index:
    """Returns the index of the shard sets in `folders`, building what is missing or out of date.

    Raises ValueError in one line for a folder without shards and for shards without one usable sample.
    """
    shards: list[ShardInfo] = []
    parquet_of: list[tuple[Path, int]] = []
    for folder in folders:
        infos, parquet = _folder_index(folder, progress)
        if not any(info.usable for info in infos):
            raise ValueError(f"{folder}: none of the samples in its {len(infos)} shards can be used: {_why(infos)}")
        shards += infos
        parquet_of += [(parquet, group) for group in range(len(infos))]
    return Index(shards, parquet_of)


def index_shard(path: Path) -> tuple[pa.Table, ShardInfo]:
    """Returns the rows of one shard and what to know of it. Damage costs the samples behind it, never more."""
    status = path.stat()
    rows: list[dict[str, Any]] = []
    problem: str | None = None
    with path.open("rb") as file:
        # An empty file cannot be mapped.
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if status.st_size else b""
        groups: dict[str, list[tar.Member]] = {}
        try:
            for member in tar.members(view):
                key, extension = _split(member.name)
                if extension:
                    groups.setdefault(key, []).append(member)
        except tar.Damaged as damage:
            problem = str(damage)
        rows = [_row(key, group, view) for key, group in groups.items()]
        if isinstance(view, mmap.mmap):
            view.close()
    table = pa.Table.from_pylist(rows, SCHEMA)
    reasons: dict[str, int] = {}
    for row in rows:
        if row["reason"] is not None:
            reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    digest = hashlib.sha256(json.dumps([path.name, rows], separators=(",", ":")).encode()).hexdigest()
    usable = len(rows) - sum(reasons.values())
    info = ShardInfo(str(path), status.st_size, status.st_mtime_ns, len(rows), usable, digest, reasons, problem)
    return table, info


def _split(name: str) -> tuple[str, str]:
    """The (key, extension) of a member, as webdataset splits them: at the first dot of the file's own name."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower() if stem else ""


_IMAGES = ("jpg", "jpeg")
_OTHER_IMAGES = ("png", "webp", "gif", "bmp", "avif", "tif", "tiff")


def _row(key: str, group: Sequence[tar.Member], view: mmap.mmap | bytes) -> dict[str, Any]:
    by_extension: dict[str, tar.Member] = {}
    reason: str | None = None
    for member in group:
        extension = _split(member.name)[1]
        if extension in by_extension:
            reason = "two members of the same name"
        by_extension.setdefault(extension, member)
    image = next((by_extension[name] for name in _IMAGES if name in by_extension), None)
    texts = [
        (member.offset, min(member.size, MAX_CAPTION_BYTES))
        for extension, member in sorted(by_extension.items(), key=lambda entry: (entry[0] != "txt", entry[1].offset))
        if extension == "txt" or extension.endswith(".txt")
    ]
    captions = [(offset, size) for offset, size in texts if view[offset : offset + size].strip(b" \t\r\n\0")]
    width = height = 0
    if image is None:
        other = next((name for name in _OTHER_IMAGES if name in by_extension), None)
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
        height, width, colours, _ = simplejpeg.decode_jpeg_header(jpeg, strict=False)
    except Exception:  # simplejpeg raises ValueError, and KeyError for what libjpeg does not know
        return 0, 0, "damaged JPEG header"
    if colours not in ("YCbCr", "Gray", "RGB"):
        return height, width, f"JPEG in {colours}"
    if width * height > MAX_PIXELS:
        return height, width, f"over {MAX_PIXELS // 1_000_000} megapixels"
    if min(width, height) < MIN_SIDE:
        return height, width, f"a side under {MIN_SIDE} pixels"
    if max(width, height) > MAX_ASPECT * min(width, height):
        return height, width, f"longer than {MAX_ASPECT} times its width"
    if b"\xff\xd9" not in bytes(jpeg[-_EOI_TAIL:]):
        return height, width, "JPEG cut off"
    return height, width, None


def _class_id(text: bytes) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _why(infos: Sequence[ShardInfo]) -> str:
    reasons = sorted(
        {reason for info in infos for reason in (*info.rejected, *([info.problem] if info.problem else []))}
    )
    return ", ".join(reasons[:4]) or "they are empty"


def _folder_index(folder: Path, progress: bool) -> tuple[list[ShardInfo], Path]:
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder; `python ingest.py datasets/emoji.toml --out DIR` makes one")
    paths = sorted(path for path in folder.glob("*.tar") if path.is_file())
    if not paths:
        inside = sorted(path.parent.name for path in folder.glob("*/*.tar"))
        advice = f"its folder {folder / inside[0]} has some" if inside else "give the folder that holds NNNNN.tar files"
        raise ValueError(f"--data {folder}: no .tar shards in it; {advice}")
    for path in (folder / INDEX_NAME, _cache_path(folder)):
        infos = _load(path, folder)
        if infos is not None and [_identity(info) for info in infos] == [_stat(path) for path in paths]:
            return infos, path
    return _build(folder, paths, progress)


def _identity(info: ShardInfo) -> tuple[str, int, int]:
    return Path(info.path).name, info.shard_bytes, info.mtime_ns


def _stat(path: Path) -> tuple[str, int, int]:
    status = path.stat()
    return path.name, status.st_size, status.st_mtime_ns


def _load(path: Path, folder: Path) -> list[ShardInfo] | None:
    """The shards that an index file describes; None where there is none that this version can use."""
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    if metadata.get(b"shortclip.version") != str(VERSION).encode():
        return None
    # The folder may have been moved or copied with its index, so the file knows shards by name only.
    entries = json.loads(metadata[b"shortclip.shards"])
    return [ShardInfo(**{**entry, "path": str(folder / entry["path"])}) for entry in entries]


def _build(folder: Path, paths: Sequence[Path], progress: bool) -> tuple[list[ShardInfo], Path]:
    infos: list[ShardInfo] = []
    with _scratch(folder) as (scratch, home):
        # Parquet's metadata is written last, so the shards' own records can travel in the same file.
        with pq.ParquetWriter(scratch, SCHEMA) as writer:
            for path in tqdm(paths, desc=f"indexing {folder}", unit=" shards", disable=not progress or None):
                table, info = index_shard(path)
                # A shard without rows still gets its row group: groups are counted by shard.
                writer.write_table(table, row_group_size=max(len(table), 1))
                infos.append(info)
            records = json.dumps([{**asdict(info), "path": Path(info.path).name} for info in infos])
            writer.add_key_value_metadata({"shortclip.version": str(VERSION), "shortclip.shards": records})
        os.replace(scratch, home)
    for info in infos:
        if info.problem:
            tqdm.write(f"{info.path}: {info.problem}; {info.usable:,} samples before that are used")
    return infos, home


@contextlib.contextmanager
def _scratch(folder: Path) -> Generator[tuple[Path, Path]]:
    """A temporary file and the name it is to take: beside the shards, else in the cache."""
    home = folder / INDEX_NAME
    if not os.access(folder, os.W_OK):
        home = _cache_path(folder)
        home.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=home.parent, prefix=f"{INDEX_NAME}.", suffix=".partial")
    os.close(handle)
    try:
        yield Path(name), home
    finally:
        Path(name).unlink(missing_ok=True)


def _cache_path(folder: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "shortclip" / "index" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.parquet"
