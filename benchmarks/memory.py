"""Memory of the loader over many batches: `python -m benchmarks.memory --data DIR`.

Prints how fast resident memory grows, with the noise of that figure, and its peak. The run is cut into ten pieces of
equal length, a line is fitted to each, and the spread of their slopes is the noise; the first tenth is warm-up.
"""

import itertools
import math
import os
import resource
import statistics
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

from pipeline.command import exit_code
from pipeline.index import open_index
from pipeline.loader import DecoderName, Loader, Settings
from pipeline.order import Order, default_lanes

from .cases import Case
from .command import write_json
from .environment import environment

_PIECES = 10
_ARENA_BYTES = 1 << 20
"""What Python asks the system for at a time: one such step over a run is no slope."""
_LOOKS = 1000
"""How often memory is looked at over a run."""


@dataclass(frozen=True)
class Memory:
    """Run the loader and watch the memory of the process."""

    data: tuple[Path, ...]
    """Folders of shards, read as one."""
    decoder: DecoderName = "turbo"
    tokens: int = 16
    text_tokens: int = 16
    batch_size: int = 64
    batches: int = 20_000
    threads: int = 1
    workers: int = 0
    """Processes that make the batches instead; their memory counts too, shared pages once in each."""
    json: Path | None = None
    """Write the figures, and every look at memory, here."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name in ("batch_size", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if self.workers < 0:
            raise ValueError(f"--workers {self.workers} is below 0; 0 makes batches on --threads of this process")
        if self.batches < 4 * _PIECES:
            raise ValueError(f"--batches {self.batches} is too few for a slope; give at least {4 * _PIECES}")


@dataclass(frozen=True)
class Growth:
    """How memory went, after the warm-up."""

    bytes_per_batch: float
    noise_bytes_per_batch: float
    """Standard error of it, and no less than what one arena more or less makes; zero is within twice this."""
    peak_bytes: int
    """Of the process since it began, libraries included; with workers, the highest that was seen of all together."""
    end_bytes: int

    @property
    def flat(self) -> bool:
        return abs(self.bytes_per_batch) <= 2 * self.noise_bytes_per_batch


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    torch.set_num_threads(1)
    config = tyro.cli(Memory, args=arguments, description=__doc__)
    config.check()
    looks = watch(config)
    found = growth(looks)
    maker = f"workers {config.workers}" if config.workers else f"threads {config.threads}"
    verdict = "zero within noise" if found.flat else "not zero"
    print(
        f"{config.decoder}, {config.batches:,} batches of {config.batch_size}, {maker}: "
        f"{found.bytes_per_batch:+,.0f} +- {2 * found.noise_bytes_per_batch:,.0f} bytes a batch ({verdict}), "
        f"{found.bytes_per_batch * config.batches / 2**20:+.1f} MiB over the run\n"
        f"resident at the end {found.end_bytes / 2**20:,.0f} MiB, peak {found.peak_bytes / 2**20:,.0f} MiB"
    )
    write_json(config.json, {"environment": environment(), **asdict(found), "looks": looks}, indent=None)


def watch(config: Memory) -> list[tuple[int, int]]:
    """Runs the loader and returns (batches made, resident bytes) along the way."""
    index = open_index(config.data)
    lanes = default_lanes(config.batch_size)
    order = Order(index.shard_sizes, batch_size=config.batch_size, seed=0, lanes=lanes)
    loader = Loader(index, order, Settings(Case(config.tokens).geometry, config.text_tokens, config.decoder))
    every = max(1, config.batches // _LOOKS)
    looks: list[tuple[int, int]] = []
    batches = loader.batches(0, config.batches, threads=config.threads, workers=config.workers)
    for step, _batch in enumerate(tqdm(batches, total=config.batches, unit=" batches", disable=None), 1):
        if step % every == 0:
            looks.append((step, resident_bytes()))
    return looks


def growth(looks: Sequence[tuple[int, int]]) -> Growth:
    """Returns the slope of resident bytes over batches, and its noise from the slopes of equal pieces."""
    steps, resident = np.array(looks[len(looks) // _PIECES :], np.float64).T
    whole = float(np.polyfit(steps - steps.mean(), resident, 1)[0])
    pieces = [
        float(np.polyfit(at - at.mean(), of, 1)[0])
        for at, of in zip(np.array_split(steps, _PIECES), np.array_split(resident, _PIECES), strict=True)
    ]
    least = _ARENA_BYTES / float(steps[-1] - steps[0]) / 2
    noise = max(least, statistics.stdev(pieces) / math.sqrt(len(pieces)))
    peak = max(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, *(held for _, held in looks))
    return Growth(whole, noise, peak, int(resident[-1]))


def resident_bytes() -> int:
    """Returns the memory that this process and its workers hold now. Linux only, as the rest of the figures."""
    started = (path.read_text().split() for path in Path("/proc/self/task").glob("*/children"))
    pages = 0
    for process in ("self", *itertools.chain.from_iterable(started)):
        with suppress(OSError):  # a worker may have ended meanwhile
            pages += int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    sys.exit(main())
