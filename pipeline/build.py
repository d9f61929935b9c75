"""A shard set in, its index files out: scan.py over every shard, in worker processes where the set is large.

An index file holds up to 1,024 shards, one row group each; a larger set has several. Each is whole or not there, so a
build that was killed goes on with the first file that is missing, and a change costs only the files it touches.
Rows are written as they come, in shard order: the bytes do not depend on the number of workers.
"""

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from .cache import OpenFile
from .files import replacing
from .scan import SCHEMA, ShardInfo, index_shard
from .sources import Shard, is_remote
from .store import Limits, ReadFailed, Store, cache_root
from .workers import WorkerPool

INDEX_NAME = "_index.parquet"
VERSION = 4
"""Raise it when the same shards give other rows, or their record changes: older files are built anew."""
PART_SHARDS = 1024
"""Of one index file: its footer is then under 1 MB, and a killed build loses minutes."""
_WORTH_WORKERS_SHARDS = 8
_WORTH_WORKERS_BYTES = 256 << 20
"""Below, a set is indexed sooner than worker processes start."""

# Offsets grow along a shard and keys count up: as differences they take a third of the space.
_ENCODING: dict[str, Any] = {
    "use_dictionary": ["width", "class_id", "reason"],
    "write_statistics": False,
    "column_encoding": {
        "key": "DELTA_BYTE_ARRAY",
        "image_offset": "DELTA_BINARY_PACKED",
        "caption_offset.list.element": "DELTA_BINARY_PACKED",
    },
    "compression": "zstd",
    "compression_level": 1,
}

Scanned = tuple[Any, ShardInfo]
"""The rows of a shard, an Arrow table, and what is known of it."""
Part = tuple[Path, list[ShardInfo]]
"""An index file and its shards, one for each of its row groups."""


def open_parts(
    source: str | Path,
    shards: Sequence[Shard],
    store: Store,
    *,
    progress: bool = True,
    workers: int | None = None,
    part_shards: int = PART_SHARDS,
) -> list[Part]:
    """Returns the index files of a source in order, building those that are missing or out of date.

    workers: processes; None for as many as pay. Raises ReadFailed where a shard cannot be read.
    """
    pieces = [shards[start : start + part_shards] for start in range(0, len(shards), part_shards)]
    parts = [_find(source, number, piece) for number, piece in enumerate(pieces)]
    if any(part is None for part in parts):
        home = _home(source)
        with _only_builder(home):
            # Another process may have built them while this one waited: ranks start together.
            parts = [part or _find(source, number, pieces[number]) for number, part in enumerate(parts)]
            todo = [number for number, part in enumerate(parts) if part is None]
            missing = [shard for number in todo for shard in pieces[number]]
            workers = _default_workers(missing) if workers is None else workers
            with (
                closing(_scan_all(missing, store, workers)) as scanned,
                tqdm(
                    total=len(missing), desc=f"indexing {source}", unit=" shards", disable=not progress or None
                ) as bar,
            ):
                for number in todo:
                    path = home / _file_name(source, number, home)
                    parts[number] = (path, write_part(path, islice(scanned, len(pieces[number])), bar))
    return [part for part in parts if part is not None]


def write_part(path: Path, scanned: Iterable[Scanned], bar: "tqdm[Any] | None" = None) -> list[ShardInfo]:
    """Writes one index file from the rows of its shards as they come; returns what is known of them."""
    infos: list[ShardInfo] = []
    # Parquet's metadata is written last, so the shards' own records can travel in the same file.
    with replacing(path) as file, pq.ParquetWriter(file, SCHEMA, **_ENCODING) as writer:
        for table, info in scanned:
            # A shard without rows still gets its row group: groups are counted by shard.
            writer.write_table(table, row_group_size=max(len(table), 1))
            infos.append(info)
            if info.problem:
                tqdm.write(f"{info.path}: {info.problem}; {info.usable:,} samples before that are used")
            if bar is not None:
                bar.update()
        # The folder may be moved or copied with its index, so the file knows shards by name only.
        records = json.dumps([{**asdict(info), "path": info.name} for info in infos])
        writer.add_key_value_metadata({"shortclip.version": str(VERSION), "shortclip.shards": records})
    return infos


def _find(source: str | Path, number: int, shards: Sequence[Shard]) -> Part | None:
    """An index file that describes just these shards, wherever it is kept."""
    homes = [_cache_folder()] if is_remote(source) else [Path(source), _cache_folder()]
    for home in homes:
        path = home / _file_name(source, number, home)
        infos = _load(path, shards)
        if infos is not None:
            return path, infos
    return None


def _load(path: Path, shards: Sequence[Shard]) -> list[ShardInfo] | None:
    try:
        metadata = pq.read_metadata(path).metadata or {}
    except (OSError, pa.ArrowInvalid):
        return None
    if metadata.get(b"shortclip.version") != str(VERSION).encode():
        return None
    records: list[dict[str, Any]] = json.loads(metadata[b"shortclip.shards"])
    known = [(record["path"], record["shard_bytes"], record["identity"]) for record in records]
    if known != [(shard.name, shard.shard_bytes, shard.identity) for shard in shards]:
        return None
    for record, shard in zip(records, shards, strict=True):
        record["path"] = shard.path
    return [ShardInfo(**record) for record in records]


def _scan_all(shards: Sequence[Shard], store: Store, workers: int) -> Generator[Scanned]:
    """The rows of each shard, in order; a few shards are scanned ahead of the one that is asked for."""
    if workers <= 1:
        yield from (scan_shard(shard, store) for shard in shards)
        return
    pool = WorkerPool(workers, _start, store.limits)
    ahead: deque[tuple[Shard, Future[Scanned]]] = deque()
    shard = None
    try:
        for coming in shards:
            ahead.append((coming, pool.submit(_scan_in_worker, coming)))
            if len(ahead) > 2 * workers:
                shard, scanning = ahead.popleft()
                yield scanning.result()
        while ahead:
            shard, scanning = ahead.popleft()
            yield scanning.result()
    except BrokenProcessPool:
        near = shard.path if shard else shards[0].path
        raise ValueError(
            f"{near}: a worker process died while indexing it or one of the next {2 * workers}; memory may be short, "
            "or a shard is being written; run the same command again"
        ) from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def scan_shard(shard: Shard, store: Store) -> Scanned:
    """Returns the rows of a shard, wherever it is. Raises ReadFailed where it cannot be read."""
    try:
        if is_remote(shard.path):
            opened = store.open(shard.path, shard.shard_bytes, shard.identity)
        else:
            # Where a pipe lies under a shard's name, opening must not wait for its writer.
            opened = OpenFile(os.open(shard.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        return index_shard(shard, opened.descriptor)
    except OSError as error:
        raise ReadFailed(f"{shard.path}: cannot be read ({error.strerror or error})") from None


_worker_store: Store | None = None


def _start(limits: Limits) -> None:
    global _worker_store
    _worker_store = Store(limits)


def _scan_in_worker(shard: Shard) -> Scanned:
    assert _worker_store is not None
    try:
        return scan_shard(shard, _worker_store)
    finally:
        _worker_store.cache.release()


def _default_workers(shards: Sequence[Shard]) -> int:
    total_bytes = sum(shard.shard_bytes for shard in shards)
    if len(shards) < _WORTH_WORKERS_SHARDS or total_bytes < _WORTH_WORKERS_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(shards))


def _home(source: str | Path) -> Path:
    """Where a set's index is written: beside the shards, else in the cache."""
    if not is_remote(source) and os.access(source, os.W_OK):
        return Path(source)
    _cache_folder().mkdir(parents=True, exist_ok=True)
    return _cache_folder()


def _cache_folder() -> Path:
    return cache_root() / "index"


def _file_name(source: str | Path, number: int, home: Path) -> str:
    if home != _cache_folder():
        return part_name(INDEX_NAME, number)
    whole = str(source) if is_remote(source) else str(Path(source).resolve())
    return part_name(f"{hashlib.sha256(whole.encode()).hexdigest()[:24]}.parquet", number)


def part_name(name: str, number: int) -> str:
    """Returns the name of a set's index file: the first has the set's own, the others their number in it."""
    stem, suffix = os.path.splitext(name)
    return f"{stem}-{number:05d}{suffix}" if number else name


@contextmanager
def _only_builder(home: Path) -> Generator[None]:
    """Holds the folder of an index while it is built; the kernel lets go when the process ends."""
    descriptor = os.open(home, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no folders: building twice costs time, no more
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
