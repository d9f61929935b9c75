"""Images per second of the loader alone, every stage counted: `python -m benchmarks.pipeline --data data/emoji/train`.

The unit is images per second of process CPU time, all threads together: on a busy machine it holds still where wall
time swings. Decoders take turns, round after round, so that both see the same machine.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from evaluation.report import format_table
from pipeline.index import Index, open_index
from pipeline.loader import STAGES, DecoderName, Loader, Settings
from pipeline.order import Order, default_lanes
from pipeline.tokens import token_geometry

from .environment import environment


@dataclass(frozen=True)
class Benchmark:
    """Measure the loader alone: read, checks, plan, decode, captions."""

    data: tuple[Path, ...]
    """Folders of shards."""
    decoder: Literal["both", "dali", "turbo"] = "both"
    tokens: int = 16
    text_tokens: int = 16
    batch_size: int = 256
    batches: int = 20
    """Per round and decoder."""
    rounds: int = 5
    threads: int = 1
    json: Path | None = None
    """Write the rows here."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "batches", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")


@dataclass(frozen=True)
class Row:
    """One decoder's figures: medians over the rounds."""

    decoder: str
    tokens: int
    threads: int
    images_per_cpu_s: float
    images_per_cpu_s_range: tuple[float, float]
    images_per_s: float
    megabytes_per_cpu_s: float
    gil_us: float | None
    """Time an image holds the GIL, in microseconds of wall time; None without gilknocker."""
    stage_us: dict[str, float]
    """CPU time an image spends in each stage."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what the user can mend."""
    config = tyro.cli(Benchmark, args=arguments, description=__doc__)
    # The loader's threads are the parallelism that is measured.
    torch.set_num_threads(1)
    try:
        rows = measure(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_table(rows))
    if config.json:
        result = {
            "environment": environment(),
            "data": list(map(str, config.data)),
            "rows": [asdict(row) for row in rows],
        }
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def measure(config: Benchmark) -> list[Row]:
    """Returns a row a decoder. Raises ValueError for data that cannot be used."""
    index = open_index(config.data)
    image_bytes = sum(float(index.rows(shard).image_bytes.sum()) for shard in range(len(index.shards)))
    mean_bytes = image_bytes / index.num_samples
    names: tuple[DecoderName, ...] = ("turbo", "dali") if config.decoder == "both" else (config.decoder,)
    loaders = {name: _loader(config, index, name) for name in names}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for loader in loaders.values():
        list(loader.batches(0, 1 + config.threads, threads=config.threads))  # warm-up: files, decoders, tables
    for turn in range(config.rounds):
        for name, loader in loaders.items():
            rounds[name].append(_round(config, loader, 1 + turn * config.batches))
    gil_us = {name: _gil_us(config, loader, 1 + config.rounds * config.batches) for name, loader in loaders.items()}
    return [_row(config, name, rounds[name], mean_bytes, gil_us[name]) for name in names]


def _loader(config: Benchmark, index: Index, decoder: DecoderName) -> Loader:
    lanes = default_lanes(config.batch_size)
    order = Order(index.shard_sizes, batch_size=config.batch_size, seed=0, lanes=lanes)
    return Loader(index, order, Settings(token_geometry(config.tokens), config.text_tokens, decoder))


def _round(config: Benchmark, loader: Loader, first_step: int) -> dict[str, float]:
    for stage in STAGES:
        loader.stage_seconds[stage] = 0.0
    images, cpu, wall = _run(config, loader, first_step)
    stages = {stage: seconds / images * 1e6 for stage, seconds in loader.stage_seconds.items()}
    return {"per_cpu_s": images / cpu, "per_s": images / wall, **stages}


def _run(config: Benchmark, loader: Loader, first_step: int) -> tuple[int, float, float]:
    """Returns the images of a round, and the seconds of CPU and wall time that they took."""
    images = 0
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in loader.batches(first_step, first_step + config.batches, threads=config.threads):
        images += len(batch.valid)
    return images, time.process_time() - cpu, time.perf_counter() - wall


def _gil_us(config: Benchmark, loader: Loader, first_step: int) -> float | None:
    """Returns the wall time an image holds the GIL, in microseconds. In a round of its own: the meter takes a core."""
    knocker = _gil_meter()
    if knocker is None:
        return None
    knocker.start()
    images, _, wall = _run(config, loader, first_step)
    knocker.stop()
    return knocker.contention_metric * wall / images * 1e6


def _gil_meter() -> Any:
    """A thread outside Python that asks for the GIL a thousand times a second and notes how long it waits."""
    try:
        from gilknocker import KnockKnock  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs
    except ImportError:
        return None
    return KnockKnock(polling_interval_micros=1000, sampling_interval_micros=1000, sleeping_interval_micros=0)


def _row(
    config: Benchmark, decoder: str, rounds: list[dict[str, float]], mean_bytes: float, gil_us: float | None
) -> Row:
    median = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
    per_cpu_s = [each["per_cpu_s"] for each in rounds]
    return Row(
        decoder=decoder,
        tokens=config.tokens,
        threads=config.threads,
        images_per_cpu_s=median["per_cpu_s"],
        images_per_cpu_s_range=(min(per_cpu_s), max(per_cpu_s)),
        images_per_s=median["per_s"],
        megabytes_per_cpu_s=median["per_cpu_s"] * mean_bytes / 1e6,
        gil_us=gil_us,
        stage_us={stage: median[stage] for stage in STAGES},
    )


def _table(rows: list[Row]) -> str:
    header = (
        "decoder",
        "img per CPU s",
        "(range)",
        "img/s",
        "MB per CPU s",
        "GIL us",
        *(f"{stage} us" for stage in STAGES),
    )
    return format_table(
        header,
        [
            (
                row.decoder,
                f"{row.images_per_cpu_s:,.0f}",
                "{:,.0f}-{:,.0f}".format(*row.images_per_cpu_s_range),
                f"{row.images_per_s:,.0f}",
                f"{row.megabytes_per_cpu_s:.1f}",
                "-" if row.gil_us is None else f"{row.gil_us:.1f}",
                *(f"{row.stage_us[stage]:.1f}" for stage in STAGES),
            )
            for row in rows
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
