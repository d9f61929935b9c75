"""Shard sets in, their samples by id out: an index built once by scan.py and read as batches ask for shards.

It is kept as `_index.parquet` beside the shards (in a cache folder where those are read-only), one row group a shard.
Captions stay in the shards. An open index costs about 1 KB a shard plus the rows of the shards in use.
"""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .files import replacing
from .scan import SCHEMA, ShardInfo, index_shard

INDEX_NAME = "_index.parquet"
VERSION = 1
"""Raise it when the same shards give other rows: older files are built anew."""

IntArray = npt.NDArray[np.int64]


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
        paths = {path for path, _ in parquet_of}
        self._written = {path: _stat(path) for path in paths}
        # A footer describes every shard of its set: read once, not with each shard's rows.
        self._footers = {path: pq.read_metadata(path) for path in paths}
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

    def usable_class_ids(self) -> IntArray:
        """Returns the class of each of `usable_ids`, int64 [num_usable]; -1 where a sample has none."""
        shards = map(self.rows, range(len(self.shards)))
        return np.concatenate([rows.class_id[rows.usable] for rows in shards]).astype(np.int64)

    def _read_rows(self, shard: int) -> ShardRows:
        path, group = self._parquet_of[shard]
        if _stat(path) != self._written[path]:
            raise ValueError(
                f"{path} was built anew while it was in use: the shards changed; run the same command again"
            )
        table = pq.ParquetFile(path, metadata=self._footers[path]).read_row_group(group)
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
    """What tells one state of a file from another: name, bytes, time."""
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
    entries: list[dict[str, Any]] = json.loads(metadata[b"shortclip.shards"])
    for entry in entries:
        entry["path"] = str(folder / Path(entry["path"]).name)
    return [ShardInfo(**entry) for entry in entries]


def _build(folder: Path, paths: Sequence[Path], progress: bool) -> tuple[list[ShardInfo], Path]:
    infos: list[ShardInfo] = []
    home = _home(folder)
    # Parquet's metadata is written last, so the shards' own records can travel in the same file.
    with replacing(home) as file, pq.ParquetWriter(file, SCHEMA) as writer:
        for path in tqdm(paths, desc=f"indexing {folder}", unit=" shards", disable=not progress or None):
            table, info = index_shard(path)
            # A shard without rows still gets its row group: groups are counted by shard.
            writer.write_table(table, row_group_size=max(len(table), 1))
            infos.append(info)
        records = json.dumps([{**asdict(info), "path": Path(info.path).name} for info in infos])
        writer.add_key_value_metadata({"shortclip.version": str(VERSION), "shortclip.shards": records})
    for info in infos:
        if info.problem:
            tqdm.write(f"{info.path}: {info.problem}; {info.usable:,} samples before that are used")
    return infos, home


def _home(folder: Path) -> Path:
    """Where a folder's index is kept: beside the shards, else in the cache."""
    if os.access(folder, os.W_OK):
        return folder / INDEX_NAME
    path = _cache_path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _cache_path(folder: Path) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "shortclip" / "index" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.parquet"
