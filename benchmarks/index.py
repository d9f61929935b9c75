"""What a large index costs in memory, and in time to open it and find a batch: `python -m benchmarks.index`.

The index is synthetic (rows of real sizes, shards of no bytes) and written by the code that writes real ones. With
--data the header checks are timed on real shards instead: samples a second of one core's CPU time.
"""

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro

from pipeline.build import INDEX_NAME, PART_SHARDS, part_name, scan_shard, write_part
from pipeline.command import exit_code
from pipeline.index import open_index
from pipeline.order import Order
from pipeline.read import Reader
from pipeline.scan import SCHEMA, ShardInfo
from pipeline.sources import Shard
from pipeline.store import Limits, Store
from pipeline.table import format_table

from .command import write_json
from .environment import environment


@dataclass(frozen=True)
class Benchmark:
    """Measure the index."""

    rows: int = 100_000_000
    rows_per_shard: int = 10_000
    batches: int = 200
    """Random batches to locate."""
    batch_size: int = 1024
    data: Path | None = None
    """Index these shards, in memory and with one process, instead."""
    folder: Path | None = None
    """Where the synthetic index lies meanwhile; about 8 bytes a row."""
    json: Path | None = None
    """Write the figures here."""

    def __post_init__(self) -> None:
        for name in ("rows", "rows_per_shard", "batches", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")


@dataclass(frozen=True)
class Opened:
    """Figures of one process that opens the index and locates batches."""

    rows: int
    shards: int
    index_mib: float
    open_s: float
    open_cpu_s: float
    open_peak_mib: float
    """Peak resident memory over what the imports take."""
    ordered_batch_cpu_ms: float
    """CPU time to plan and locate a batch as a run asks for it, 64 lanes of 4 shards each; median."""
    random_batch_cpu_ms: float
    """The same for ids drawn from everywhere: each batch reads the rows of as many shards."""
    peak_mib: float
    """After all batches."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    config = tyro.cli(Benchmark, args=arguments, description=__doc__)
    result = scan_rate(config.data) if config.data else synthetic(config)
    print(format_table(("figure", "value"), [(name, f"{value:,.1f}") for name, value in result.items()]))
    write_json(config.json, {"environment": environment(), **result})


def scan_rate(folder: Path, rounds: int = 5) -> dict[str, float]:
    """Returns the rate of the whole build in one process: headers, checks, rows, Parquet."""
    store = Store(Limits())
    shards = store.shards(folder)
    rates: list[float] = []
    samples = 0
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(rounds):
            before = time.process_time()
            scanned = (scan_shard(shard, store) for shard in shards)
            infos = write_part(Path(scratch) / "index.parquet", scanned)
            samples = sum(info.samples for info in infos)
            rates.append(samples / (time.process_time() - before))
    return {
        "shards": len(shards),
        "samples": samples,
        "samples_per_cpu_s": statistics.median(rates),
        "samples_per_cpu_s_min": min(rates),
        "samples_per_cpu_s_max": max(rates),
    }


def synthetic(config: Benchmark) -> dict[str, float]:
    """Returns the figures of a synthetic index, measured in a process of its own; nothing of it is left behind."""
    folder = Path(tempfile.mkdtemp(prefix="shortclip-index-", dir=config.folder))
    try:
        written = time.perf_counter()
        _write(folder, config)
        written = time.perf_counter() - written
        numbers = (str(folder), str(config.batches), str(config.batch_size))
        command = [sys.executable, "-c", "from benchmarks.index import opened; opened()", *numbers]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise ValueError("the measuring process failed; its error stands above")
        return {"write_s": written, **json.loads(done.stdout)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def opened() -> None:
    """The measuring process: opens the index in argv[1], prints an Opened as JSON."""
    folder, batches, batch_size = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    imported_mib = _peak_mib()
    wall, cpu = time.perf_counter(), time.process_time()
    index = open_index([folder], progress=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    open_peak_mib = _peak_mib() - imported_mib
    order = Order(index.shard_sizes, batch_size=batch_size, seed=0, lanes=min(64, batch_size))
    reader = Reader(index)
    ordered_s: list[float] = []
    for step in range(batches):
        before = time.process_time()
        reader.locate(order.slots(step))
        ordered_s.append(time.process_time() - before)
    random_s: list[float] = []
    rng = np.random.default_rng(0)
    for _ in range(3):
        before = time.process_time()
        reader.locate_ids(rng.integers(0, index.num_samples, batch_size))
        random_s.append(time.process_time() - before)
    result = Opened(
        rows=index.num_samples,
        shards=len(index.shards),
        index_mib=sum(path.stat().st_size for path in folder.glob("_index*")) / 2**20,
        open_s=wall,
        open_cpu_s=cpu,
        open_peak_mib=open_peak_mib,
        ordered_batch_cpu_ms=statistics.median(ordered_s) * 1e3,
        random_batch_cpu_ms=statistics.median(random_s) * 1e3,
        peak_mib=_peak_mib() - imported_mib,
    )
    print(json.dumps(asdict(result)))


def _write(folder: Path, config: Benchmark) -> None:
    """Writes empty shards, and the index files that belong to them."""
    count = -(-config.rows // config.rows_per_shard)
    shards: list[Shard] = []
    for i in range(count):
        path = folder / f"{i:06d}.tar"
        path.touch()
        shards.append(Shard(str(path), 0, str(path.stat().st_mtime_ns)))
    for number, start in enumerate(range(0, count, PART_SHARDS)):
        write_part(
            folder / part_name(INDEX_NAME, number), _rows(shards[start : start + PART_SHARDS], config.rows_per_shard)
        )


def _rows(shards: list[Shard], samples: int) -> Generator[tuple[Any, ShardInfo]]:
    """The same rows for every shard, of sizes as 256-pixel shards have them."""
    rng = np.random.default_rng(0)
    image_bytes = rng.integers(15_000, 45_000, samples)
    caption_bytes = rng.integers(15, 120, samples)
    blocks = -(-image_bytes // 512) + 4  # headers, and a caption in a block of its own
    offset = (np.cumsum(blocks) - blocks + 1) * 512
    table = pa.Table.from_pydict(
        {
            "key": [f"{i:09d}" for i in range(samples)],
            "image_offset": offset,
            "image_bytes": image_bytes.astype(np.int32),
            "width": rng.integers(256, 400, samples).astype(np.int32),
            "height": np.full(samples, 256, np.int32),
            "caption_offset": list((offset + image_bytes)[:, None]),
            "caption_bytes": list(caption_bytes.astype(np.int32)[:, None]),
            "class_id": [None] * samples,
            "reason": [None] * samples,
        },
        SCHEMA,
    )
    for shard in shards:
        yield table, ShardInfo(shard.path, shard.shard_bytes, shard.identity, samples, samples, "0" * 64)


def _peak_mib() -> float:
    # Not getrusage: its peak is inherited from the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    sys.exit(main())
