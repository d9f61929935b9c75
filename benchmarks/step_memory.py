"""Memory of the whole step against batch size: `python -m benchmarks.step_memory`.

Forward, loss, backward and optimiser of a small model, with the tiled and the dense loss, each way to lay the step out
(whole, activation checkpointing, micro-batches), and each measurement in a process of its own: the most that tensors
hold at once, and the process's peak of resident memory, both over model and optimiser, the batch included. The second
is larger by what the allocator leaves unused between tensors. Prints a table, writes JSON and a plot of the first.
"""

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from model.clip import CLIP
from model.loss import Features, LossKind, contrastive_loss
from model.presets import model_config
from pipeline.batch import Batch
from pipeline.command import exit_code
from training import optim
from training.accumulation import Inputs, accumulated
from training.distributed import World
from training.fields import Config
from training.health import Skips
from training.heap import keep_freed_memory
from training.parallel import backward, over_ranks, spread

from .command import write_json, write_picture
from .environment import environment
from .peak import in_own_process, peaks_of
from .step_model import made_batches

Layout = Literal["whole", "checkpointing", "micro-batches"]
"""whole: as without flags. checkpointing: --grad-checkpointing. micro-batches: --accumulate, of a fixed size."""

_RESULTS = Path(__file__).parent / "results"
_WARM_UP = 8
"""Pairs of a first step: what the first use of torch loads, and the optimiser's state, are no part of the peak."""
_DENSE_MATRICES = 6
"""Of [batch, batch] in float32 that a dense loss is taken to hold at once, to say beforehand what fits."""
_COLOURS: dict[Layout, str] = {"whole": "#b3261e", "checkpointing": "#c2620a", "micro-batches": "#2563a8"}


@dataclass(frozen=True)
class StepMemory:
    """Measure the peak memory of the training step."""

    model: str = "ViT-96x6-16"
    tokens: int = 16
    text_tokens: int = 16
    batch_sizes: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384)
    micro: int = 256
    """Pairs of a micro-batch."""
    losses: tuple[LossKind, ...] = get_args(LossKind)
    most_gib: float = 9.0
    """A line ends where its next point would need more than this."""
    json: Path = _RESULTS / "step-memory.json"
    """Where the figures go; the plot goes beside it, as .png."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        _ = Config(model=self.model, tokens=self.tokens).geometry
        if min(self.batch_sizes, default=0) < _WARM_UP:
            raise ValueError(f"--batch-sizes {min(self.batch_sizes, default=0)} is below {_WARM_UP}")
        if self.micro < 1 or any(size % self.micro for size in self.batch_sizes):
            raise ValueError(f"--micro {self.micro} does not divide each of --batch-sizes; give a divisor of them")
        if not self.losses:
            raise ValueError("--losses is empty; give infonce, sigmoid or both")


@dataclass(frozen=True)
class Row:
    kind: LossKind
    tiled: bool
    layout: Layout
    batch_size: int
    tensor_bytes: int
    """The most that tensors hold at once, over the model and its optimiser."""
    resident_bytes: int
    """The process's peak over that with the model and its optimiser in place."""

    @property
    def label(self) -> str:
        return f"{self.layout}, {'tiled' if self.tiled else 'dense'} loss"


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    config = tyro.cli(StepMemory, args=arguments, description=__doc__)
    config.check()
    rows = measured(config)
    settings = {name: getattr(config, name) for name in ("model", "tokens", "text_tokens", "micro")}
    write_json(config.json, {"environment": environment(), **settings, "rows": [asdict(row) for row in rows]})
    plot(rows, config)


def measured(config: StepMemory) -> list[Row]:
    """Returns a row for each loss, layout and batch size that fits, and prints them as they come."""
    rows: list[Row] = []
    for kind, layout in product(config.losses, get_args(Layout)):
        tiled = _line(config, kind, layout, True, {})
        rows += tiled
        rows += _line(config, kind, layout, False, {row.batch_size: row.resident_bytes for row in tiled})
    return rows


def _line(config: StepMemory, kind: LossKind, layout: Layout, tiled: bool, tiled_bytes: Mapping[int, int]) -> list[Row]:
    """tiled_bytes: what the tiled loss took, by batch size; dense, its matrices come on top."""
    line: list[Row] = []
    for batch_size in sorted(config.batch_sizes):
        if not tiled:
            need = tiled_bytes.get(batch_size, math.inf) + _DENSE_MATRICES * 4 * batch_size**2
        else:
            need = line[-1].resident_bytes * batch_size / line[-1].batch_size if line else 0
        if need > config.most_gib * 2**30:
            break
        num_micro = batch_size // config.micro if layout == "micro-batches" else 1
        arguments = (kind, tiled, layout == "checkpointing", num_micro, batch_size)
        try:
            found = in_own_process(peaks_over_model, config.model, config.tokens, config.text_tokens, *arguments)
        except ValueError as error:
            raise ValueError(f"{kind}, {layout}, batch {batch_size} could not be measured: {error}") from None
        line.append(Row(kind, tiled, layout, batch_size, *found))
        print(
            f"{kind:8} {line[-1].label:27} batch {batch_size:7,}  {line[-1].tensor_bytes / 2**20:8,.0f} MiB of tensors"
            f"  {line[-1].resident_bytes / 2**20:8,.0f} MiB resident",
            flush=True,
        )
    return line


def peaks_over_model(
    name: str,
    tokens: int,
    text_tokens: int,
    kind: LossKind,
    tiled: bool,
    checkpointing: bool,
    accumulate: int,
    batch_size: int,
) -> tuple[int, int]:
    """Returns the most bytes that the tensors of a step hold at once, and by how many a step raised the peak of this
    process; both with the batch."""
    keep_freed_memory()  # as train.py does
    torch.manual_seed(0)
    config = Config(model=name, tokens=tokens, text_tokens=text_tokens, loss=kind, grad_checkpointing=checkpointing)
    encoders, world = model_config(name), World()
    model = CLIP(encoders, grid=config.geometry.grid, text_tokens=text_tokens, logit_bias=config.logit_bias)
    called = spread(model, config, world)
    optimizer = optim.build(model, weight_decay=0.2, beta2=0.95, decayed=encoders.decayed)
    optim.set_learning_rate(optimizer, 1e-5)
    skips = Skips(torch.device("cpu"))

    def step(batch: Batch, num_micro: int) -> None:
        """What train.py's loop does with a batch."""

        def encode(inputs: Inputs) -> Features:
            return called(*inputs)

        loss_of = functools.partial(contrastive_loss, valid_B=batch.valid, kind=kind, tiled=tiled)
        inputs = (batch.patches, batch.positions, batch.caption_ids)
        if num_micro == 1:
            loss = loss_of(encode(inputs))
            backward(loss, model, world)
        else:
            _, loss = accumulated(encode, loss_of, inputs, num_micro, called=called, model=model, world=world)
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        loss, norm = over_ranks(loss, gradients, world)
        optim.step_unless(optimizer, skips.judge(loss, norm))
        optimizer.zero_grad(set_to_none=True)
        model.clamp_logit_scale()

    def step_of(size: int, num_micro: int) -> None:
        step(made_batches(encoders, config.geometry, size, text_tokens, count=1)[0], num_micro)

    step_of(_WARM_UP, min(accumulate, 2))
    return peaks_of(functools.partial(step_of, batch_size, accumulate))


def plot(rows: Sequence[Row], config: StepMemory) -> None:
    """Draws peak memory over batch size, both axes logarithmic, a panel for each loss."""
    kinds = tuple(dict.fromkeys(row.kind for row in rows))
    figure = Figure(figsize=(0.6 + 5.4 * len(kinds), 4.8), layout="constrained")
    panels = FigureCanvasAgg(figure).figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _panel(axes, [row for row in rows if row.kind == kind], config)
        axes.set_title(kind)
    panels[0].set_ylabel("most that tensors hold at once, GiB")
    panels[0].legend(fontsize="small")
    figure.suptitle(
        f"Training step of {config.model}, {config.tokens} image and {config.text_tokens} text tokens, float32, CPU; "
        f"micro-batches of {config.micro}",
        fontsize="medium",
    )
    write_picture(figure, config.json.with_suffix(".png"))


def _panel(axes: Axes, rows: Sequence[Row], config: StepMemory) -> None:
    for label in dict.fromkeys(row.label for row in rows):
        line = [row for row in rows if row.label == label]
        axes.plot(
            [row.batch_size for row in line],
            [row.tensor_bytes / 2**30 for row in line],
            marker="o",
            color=_COLOURS[line[0].layout],
            linestyle="-" if line[0].tiled else "--",
            markerfacecolor=None if line[0].tiled else "white",
            label=label,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(config.batch_sizes, [f"{size:,}" for size in config.batch_sizes])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("batch size, pairs")
    axes.grid(visible=True, which="both", alpha=0.3)


if __name__ == "__main__":
    sys.exit(main())
