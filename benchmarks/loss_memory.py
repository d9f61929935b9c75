"""Memory of the losses against batch size: `python -m benchmarks.loss_memory`.

Forward and backward of each loss, dense and tiled, each in a process of its own: the most that tensors hold at once,
and the process's peak of resident memory, both over features and parameters. The second is larger by what the allocator
leaves unused between tensors, and not the same in two runs. Dense ones stop at the batch that would not fit. Prints a
table, writes JSON and a plot of the first.
"""

import functools
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import torch
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from model.loss import Features, LossKind, contrastive_loss
from pipeline.command import exit_code

from .command import write_json, write_picture
from .environment import environment
from .peak import in_own_process, peaks_of

_RESULTS = Path(__file__).parent / "results"
_WARM_UP = 64
"""Pairs of a first step: what the first use of torch loads is no part of the loss."""
_DENSE_MATRICES = 6
"""Of [batch, batch] in float32 that a dense loss is taken to hold at once, to say beforehand what fits."""


@dataclass(frozen=True)
class LossMemory:
    """Measure the peak memory of the losses."""

    batch_sizes: tuple[int, ...] = (2048, 4096, 8192, 16_384, 32_768)
    embed_dim: int = 512
    dense_gib: float = 8.0
    """Dense losses that would need more than this are left out."""
    json: Path = _RESULTS / "loss-memory.json"
    """Where the figures go; the plot goes beside it, as .png."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name, value in (("batch-sizes", min(self.batch_sizes, default=0)), ("embed-dim", self.embed_dim)):
            if value < 1:
                raise ValueError(f"--{name} {value} is below 1")


@dataclass(frozen=True)
class Row:
    kind: LossKind
    tiled: bool
    batch_size: int
    tensor_bytes: int
    """The most that tensors hold at once, over features and parameters."""
    resident_bytes: int
    """The process's peak over that with features and parameters in place."""

    @property
    def label(self) -> str:
        return f"{self.kind}, {'tiled' if self.tiled else 'dense'}"


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    config = tyro.cli(LossMemory, args=arguments, description=__doc__)
    config.check()
    rows = measured(config)
    values = {"environment": environment(), "embed_dim": config.embed_dim, "rows": [asdict(row) for row in rows]}
    write_json(config.json, values)
    plot(rows, config)


def measured(config: LossMemory) -> list[Row]:
    """Returns a row for each loss and batch size that fits, and prints them as they come."""
    rows: list[Row] = []
    for kind in get_args(LossKind):
        for form in ("dense", "tiled"):
            for batch_size in config.batch_sizes:
                if form == "dense" and _DENSE_MATRICES * 4 * batch_size**2 > config.dense_gib * 2**30:
                    continue
                try:
                    found = in_own_process(peaks_over_inputs, kind, form == "tiled", batch_size, config.embed_dim)
                except ValueError as error:
                    raise ValueError(f"{kind}, {form}, batch {batch_size} could not be measured: {error}") from None
                rows.append(row := Row(kind, form == "tiled", batch_size, *found))
                print(
                    f"{row.label:16} batch {batch_size:7,}  {row.tensor_bytes / 2**20:8,.0f} MiB of tensors"
                    f"  {row.resident_bytes / 2**20:8,.0f} MiB resident",
                    flush=True,
                )
    return rows


def peaks_over_inputs(kind: LossKind, tiled: bool, batch_size: int, embed_dim: int) -> tuple[int, int]:
    """Returns the most bytes that the tensors of one forward and backward pass hold at once, and by how many it raised
    the peak of this process."""
    torch.manual_seed(0)
    image_BE, text_BE = torch.randn(2, batch_size, embed_dim)

    def step(number: int) -> None:
        scalars = (torch.tensor(value, requires_grad=True) for value in (0.01, -10.0))
        features = (x[:number].detach().requires_grad_() for x in (image_BE, text_BE))
        valid_B = torch.ones(number, dtype=torch.bool)
        contrastive_loss(Features(*features, *scalars), valid_B, kind=kind, tiled=tiled).backward()

    step(min(_WARM_UP, batch_size))
    return peaks_of(functools.partial(step, batch_size))


def plot(rows: list[Row], config: LossMemory) -> None:
    """Draws peak memory over batch size, both axes logarithmic."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = FigureCanvasAgg(figure).figure.subplots()
    for label in dict.fromkeys(row.label for row in rows):
        line = [(row.batch_size, row.tensor_bytes / 2**30) for row in rows if row.label == label]
        axes.plot(*zip(*line, strict=True), marker="o", linestyle="--" if "dense" in label else "-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=10)
    axes.set_xticks(config.batch_sizes, [f"{size:,}" for size in config.batch_sizes])
    axes.set(xlabel="batch size, pairs", ylabel="most that tensors hold at once, GiB")
    axes.set_title(f"Loss, forward and backward, float32, {config.embed_dim} features, CPU")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    write_picture(figure, config.json.with_suffix(".png"))


if __name__ == "__main__":
    sys.exit(main())
