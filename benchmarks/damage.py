"""What damaged images cost the others: `python -m benchmarks.damage --data DIR`.

Copies the shards with some images damaged, in several ways, and runs loaders of both batch by batch in turn; the unit
is process CPU time. Damage is done once before the index is built, which finds most of it, and once behind its back, as
disks do.
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from pipeline.command import exit_code
from pipeline.index import Index, open_index
from pipeline.loader import DecoderName, Loader, Settings
from pipeline.order import Order, default_lanes
from pipeline.table import format_table

from .cases import Case
from .command import write_json
from .damages import DAMAGES, damage_images
from .environment import environment

DamagedWhen = Literal["before the index", "after the index"]
WHEN: tuple[DamagedWhen, ...] = ("before the index", "after the index")


@dataclass(frozen=True)
class Benchmark:
    """Run the loader on shards with and without damaged images."""

    data: Path
    """A folder of shards; local."""
    decoder: Literal["both", "dali", "turbo"] = "both"
    tokens: int = 16
    text_tokens: int = 16
    share: float = 0.01
    """Of the images, damaged."""
    batch_size: int = 256
    epochs: int = 3
    """Of each loader; the first is shown for itself, since a bad image is decoded once."""
    rounds: int = 4
    """Fresh loaders, clean and damaged."""
    scratch: Path | None = None
    """Where the copies lie meanwhile; default: the system's folder for such."""
    json: Path | None = None
    """Write the figures here."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if not 0 < self.share <= 0.5:
            raise ValueError(f"--share {self.share} is not above 0 and up to 0.5; 0.01 is a hundredth of the images")


@dataclass(frozen=True)
class Epochs:
    """What the epochs of one loader cost."""

    first_good: int
    """Images that reached a batch of the first epoch."""
    good: int
    """Of all epochs."""
    cpu_s: list[float]
    wall_s: list[float]
    """Of each epoch."""
    rejected: int
    """Images that the decoder found bad."""


@dataclass(frozen=True)
class Row:
    """One decoder with one kind of damage. Ratios: good images a CPU second, of the clean shards' in the same round."""

    decoder: DecoderName
    damaged: DamagedWhen
    rejected_by_index: int
    rejected_by_decoder: int
    """In the first epoch; later ones leave them out at once."""
    first_epoch: float
    later_epochs: float | None
    all_epochs: float
    all_epochs_range: tuple[float, float]
    all_epochs_wall: float
    clean_images_per_cpu_s: float


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    torch.set_num_threads(1)
    config = tyro.cli(Benchmark, args=arguments, description=__doc__)
    before = environment()
    rows = measure(config)
    print(format_rows(rows))
    result = {
        "environment": before,
        "data": str(config.data),
        "share": config.share,
        "damages": [f"{damage.__name__}: {damage.__doc__}" for damage in DAMAGES],
        "rows": [asdict(row) for row in rows],
    }
    write_json(config.json, result)


def measure(config: Benchmark) -> list[Row]:
    """Returns a row for each decoder and each time of the damage. Raises ValueError for data that cannot be used."""
    names: tuple[DecoderName, ...] = ("turbo", "dali") if config.decoder == "both" else (config.decoder,)
    with tempfile.TemporaryDirectory(dir=config.scratch) as scratch:
        folders = {name: Path(scratch) / name.replace(" ", "-") for name in ("clean", *WHEN)}
        for folder in folders.values():
            folder.mkdir()
            for shard in sorted(config.data.glob("*.tar")):
                shutil.copyfile(shard, folder / shard.name)
        clean = open_index([folders["clean"]])
        damage_images(clean, folders[WHEN[0]], config.share)
        indexes: dict[DamagedWhen, Index] = {when: open_index([folders[when]]) for when in WHEN}
        damage_images(clean, folders[WHEN[1]], config.share)
        return [_row(config, name, clean, when, indexes[when]) for name in names for when in WHEN]


def _row(config: Benchmark, decoder: DecoderName, clean: Index, damaged: DamagedWhen, index: Index) -> Row:
    print(f"measuring {decoder}, damaged {damaged}", file=sys.stderr, flush=True)
    run_epochs(replace(config, epochs=1), decoder, (clean, index), steps=1)  # warms up: files, libraries
    rounds: list[tuple[Epochs, Epochs]] = []
    rejected = 0
    for _ in range(config.rounds):
        good, hurt = run_epochs(config, decoder, (clean, index))
        rejected = hurt.rejected
        rounds.append((good, hurt))

    def ratios(rate: Callable[[Epochs], float]) -> list[float]:
        return [rate(hurt) / rate(good) for good, hurt in rounds]

    whole = ratios(lambda each: each.good / sum(each.cpu_s))
    later = ratios(_later_rate) if config.epochs > 1 else None
    return Row(
        decoder=decoder,
        damaged=damaged,
        rejected_by_index=index.num_samples - index.num_usable,
        rejected_by_decoder=rejected,
        first_epoch=statistics.median(ratios(lambda each: each.first_good / each.cpu_s[0])),
        later_epochs=None if later is None else statistics.median(later),
        all_epochs=statistics.median(whole),
        all_epochs_range=(min(whole), max(whole)),
        all_epochs_wall=statistics.median(ratios(lambda each: each.good / sum(each.wall_s))),
        clean_images_per_cpu_s=statistics.median(good.good / sum(good.cpu_s) for good, _ in rounds),
    )


def _later_rate(epochs: Epochs) -> float:
    return (epochs.good - epochs.first_good) / sum(epochs.cpu_s[1:])


def run_epochs(
    config: Benchmark, decoder: DecoderName, indexes: Sequence[Index], steps: int | None = None
) -> list[Epochs]:
    """Returns what the epochs of a fresh loader of each index cost. They take turns batch by batch, on this thread.

    steps: batches in an epoch; default: all that are full.
    """
    lanes = default_lanes(config.batch_size)
    settings = Settings(Case(config.tokens).geometry, config.text_tokens, decoder)
    orders = [Order(each.shard_sizes, batch_size=config.batch_size, seed=0, lanes=lanes) for each in indexes]
    loaders = [Loader(index, order, settings) for index, order in zip(indexes, orders, strict=True)]
    lengths = [steps or index.num_usable // config.batch_size for index in indexes]
    spent = np.zeros((len(loaders), config.epochs, 3))  # good images, CPU and wall time
    for epoch in range(config.epochs):
        for step in range(max(lengths)):
            turn = list(enumerate(loaders))
            for number, loader in turn if step % 2 else reversed(turn):
                if step < lengths[number]:
                    cpu, wall = time.process_time(), time.perf_counter()
                    good = int(loader.batch(epoch * lengths[number] + step).valid.sum())
                    spent[number, epoch] += good, time.process_time() - cpu, time.perf_counter() - wall
    return [
        Epochs(int(each[0, 0]), int(each[:, 0].sum()), each[:, 1].tolist(), each[:, 2].tolist(), len(loader.known_bad))
        for each, loader in zip(spent, loaders, strict=True)
    ]


def format_rows(rows: list[Row]) -> str:
    """Returns the table that is printed."""
    header = ["decoder", "damaged", "index refuses", "decoder refuses", "first epoch", "later", "all", "all, wall"]
    lines = [
        [
            row.decoder,
            row.damaged,
            str(row.rejected_by_index),
            str(row.rejected_by_decoder),
            f"{row.first_epoch:.3f}",
            "-" if row.later_epochs is None else f"{row.later_epochs:.3f}",
            f"{row.all_epochs:.3f} ({row.all_epochs_range[0]:.3f} to {row.all_epochs_range[1]:.3f})",
            f"{row.all_epochs_wall:.3f}",
        ]
        for row in rows
    ]
    table = format_table(header, lines)
    return f"{table}\ngood images a CPU second, as a share of the undamaged shards'; 1 is no cost"


if __name__ == "__main__":
    sys.exit(main())
