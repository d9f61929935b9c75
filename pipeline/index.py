"""Shard sets in, their samples by id out: an index that build.py makes once, read as batches ask for shards.

It is kept as `_index.parquet` beside the shards (in a cache folder where those are remote or read-only), one row group
a shard; a set of over 1,024 shards has several such files. Captions stay in the shards. An open index costs about
1.5 KB a shard plus the rows of the shards in use, about 60 bytes a sample.
"""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from .build import INDEX_NAME, PART_SHARDS, open_parts
from .scan import ShardInfo
from .store import Limits, Store

__all__ = ["INDEX_NAME", "Index", "IntArray", "Keys", "ShardRows", "open_index"]

_SHARDS_READ = 384
"""Whose rows are kept in memory: 64 lanes read 4 shards each, and threads run a little ahead."""

IntArray = npt.NDArray[np.int64]


class Keys(Sequence[str]):
    """The keys of a shard, kept as Arrow keeps them: a sixth of a list of str."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __len__(self) -> int:
        return len(self._array)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        return Keys(self._array[index]) if isinstance(index, slice) else self._array[index].as_py()


ROW = np.dtype(
    [
        ("image_offset", np.int64),
        ("image_bytes", np.int32),
        ("width", np.int32),
        ("height", np.int32),
        ("caption_first", np.int32),
        ("num_captions", np.int32),
    ]
)
"""What a batch needs of a sample, side by side: one gather a shard instead of six."""


@dataclass(frozen=True)
class ShardRows:
    """The rows of one shard."""

    keys: Keys
    usable: npt.NDArray[np.int32]
    """Rows that can be trained on."""
    samples: npt.NDArray[Any]
    """ROW [rows]."""
    caption_offset: IntArray
    """Row r's captions are [caption_first, caption_first + num_captions) of this and the next."""
    caption_bytes: npt.NDArray[np.int32]
    class_id: npt.NDArray[np.int32]
    """-1 where the sample has none."""

    @property
    def image_offset(self) -> IntArray:
        return self.samples["image_offset"]

    @property
    def image_bytes(self) -> npt.NDArray[np.int32]:
        return self.samples["image_bytes"]

    @property
    def width(self) -> npt.NDArray[np.int32]:
        return self.samples["width"]

    @property
    def height(self) -> npt.NDArray[np.int32]:
        return self.samples["height"]

    @property
    def caption_first(self) -> npt.NDArray[np.int32]:
        return self.samples["caption_first"]

    @property
    def num_captions(self) -> npt.NDArray[np.int32]:
        return self.samples["num_captions"]


class Index:
    """The samples of one or more shard sets. A sample's id is its row, counted over all shards in order."""

    def __init__(
        self,
        shards: Sequence[ShardInfo],
        parquet_of: Sequence[tuple[Path, int]],
        source_shards: Sequence[int],
        store: Store,
    ) -> None:
        """parquet_of: for each shard, the index file and the row group that holds its rows."""
        self.shards = tuple(shards)
        self.source_shards = tuple(source_shards)
        """How many of the shards each source has, in order."""
        self.store = store
        self.remote = any("://" in shard.path for shard in shards)
        """Whether some of the shards are fetched into the cache before they are read."""
        self._parquet_of = tuple(parquet_of)
        self._written = {path: _stat(path) for path in {path for path, _ in parquet_of}}
        # A footer describes every shard of its file: read once, not with each shard's rows.
        self._footer = functools.lru_cache(maxsize=64)(pq.read_metadata)
        self.shard_sizes: IntArray = np.array([shard.usable for shard in shards], np.int64)
        self.first_ids: IntArray = np.concatenate([[0], np.cumsum([shard.samples for shard in shards])]).astype(
            np.int64
        )
        self.num_samples = int(self.first_ids[-1])
        self.num_usable = int(self.shard_sizes.sum())
        self.rows = functools.lru_cache(maxsize=_SHARDS_READ)(self._read_rows)

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
        table = pq.ParquetFile(path, metadata=self._footer(path)).read_row_group(group)
        captions = table["caption_offset"].combine_chunks()
        samples = np.empty(len(table), ROW)
        for name in ("image_offset", "image_bytes", "width", "height"):
            samples[name] = table[name].to_numpy()
        samples["num_captions"] = captions.value_lengths().to_numpy(zero_copy_only=False)
        samples["caption_first"] = np.cumsum(samples["num_captions"]) - samples["num_captions"]
        return ShardRows(
            keys=Keys(table["key"].combine_chunks()),
            usable=np.flatnonzero(table["reason"].is_null().to_numpy()).astype(np.int32),
            samples=samples,
            caption_offset=captions.flatten().to_numpy(),
            caption_bytes=table["caption_bytes"].combine_chunks().flatten().to_numpy(),
            class_id=table["class_id"].fill_null(-1).to_numpy(),
        )


def open_index(
    sources: Sequence[str | Path],
    progress: bool = True,
    *,
    workers: int | None = None,
    limits: Limits | None = None,
    part_shards: int = PART_SHARDS,
) -> Index:
    """Returns the index of shard sets, building what is missing or out of date.

    sources: local folders, or URLs as Store.shards takes them. workers: processes that build; None for as many as pay.
    part_shards: of one index file.
    Raises ValueError in one line for a source without shards and for shards without one usable sample.
    """
    store = Store(limits or Limits())
    shards: list[ShardInfo] = []
    parquet_of: list[tuple[Path, int]] = []
    source_shards: list[int] = []
    for source in sources:
        listed = store.shards(source)
        parts = open_parts(source, listed, store, progress=progress, workers=workers, part_shards=part_shards)
        infos = [info for _, part in parts for info in part]
        if not any(info.usable for info in infos):
            raise ValueError(f"{source}: none of the samples in its {len(infos)} shards can be used: {_why(infos)}")
        shards += infos
        parquet_of += [(path, group) for path, part in parts for group in range(len(part))]
        source_shards.append(len(infos))
    return Index(shards, parquet_of, source_shards, store)


def _why(infos: Sequence[ShardInfo]) -> str:
    reasons = sorted(
        {reason for info in infos for reason in (*info.rejected, *([info.problem] if info.problem else []))}
    )
    return ", ".join(reasons[:4]) or "they are empty"


def _stat(path: Path) -> tuple[int, int]:
    """What tells one state of a file from another: bytes, time."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns
