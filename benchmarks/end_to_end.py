"""Loader and model together: `python -m benchmarks.end_to_end --data data/photographs/128 --model ViT-B-16`.

Three rates in one run, in turn, round after round: the loader alone, the model alone on cached batches, and both as
train.py joins them. What can be hoped for is the lesser of the first two, each with the cores that it has beside the
other: the loader its threads, the model --model-threads, by default all cores but those. Where they are given more
than the machine has, another bound comes into it, all cores over the CPU time that an image costs both.

`--trace FILE` writes a Chrome trace of the joint run; `--sweep` looks for the tokens at which the loader is the slower.
"""

import os
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# As train.py: set before torch loads. Threads that spin while they wait take a core from the one that makes batches.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tyro

from model.presets import ModelConfig, model_config
from pipeline.command import exit_code
from pipeline.loader import DecoderName
from pipeline.tokens import Geometry, ImageReduction, token_geometry
from train import SWITCH_INTERVAL
from training.trace import profiler, write_trace

from .command import write_json
from .environment import environment
from .step_crossing import Crossing, EndToEndRow, crossings, draw_crossing, format_crossings, format_end_to_end
from .step_joint import Joint, LoaderAndModel
from .step_model import Turn
from .step_report import spread

SWEEP_TOKENS = (4, 9, 16, 25, 36, 49, 100, 196)


@dataclass(frozen=True)
class EndToEnd:
    """Measure the loader alone, the model alone, and both."""

    data: Path
    """A folder of shards."""
    model: str = "ViT-B-16"
    decoder: Literal["both", "dali", "turbo"] = "both"
    tokens: int = 16
    image_reduction: ImageReduction = "resize"
    image_size: int | None = None
    text_tokens: int = 16
    batch_size: int = 64
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    threads: int = 1
    """That make batches."""
    prefetch: int = 3
    model_threads: int | None = None
    """Of torch; default: as many as cores, less --threads."""
    steps: int = 8
    """Of the joint run in a round; the loader alone makes as many batches."""
    rounds: int = 3
    log_every: int = 4
    """Steps between two log lines."""
    checkpoint_every: int = 0
    """Steps between two checkpoints, written to a temporary folder; 0: none."""
    sweep: bool = False
    """Instead of --tokens: 4 to 196 by resizing."""
    trace: Path | None = None
    """Write a Chrome trace of one more joint run here; with several rows, one a row, with tokens and decoder added."""
    json: Path | None = None
    """Write the rows here."""
    plot: Path | None = None
    """Draw the rates against tokens as this PNG."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name in ("batch_size", "rounds", "threads", "text_tokens", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if self.steps < 2:
            raise ValueError(f"--steps {self.steps} is below 2: one step overlaps with nothing")
        for name in ("checkpoint_every", "prefetch"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 0")
        if self.model_threads is not None and self.model_threads < 1:
            raise ValueError(
                f"--model-threads {self.model_threads} is below 1; leave it out for the cores that are left"
            )
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device here; --device cpu measures this machine")
        if self.sweep and (self.tokens, self.image_reduction, self.image_size) != (16, "resize", None):
            raise ValueError("--sweep has its own tokens; leave --tokens, --image-reduction and --image-size out")

    def geometries(self, encoders: ModelConfig) -> list[Geometry]:
        """Raises ValueError for what cannot be."""
        patch = encoders.image.patch
        if self.sweep:
            return [token_geometry(tokens, patch=patch) for tokens in SWEEP_TOKENS]
        return [
            token_geometry(self.tokens, image_reduction=self.image_reduction, image_size=self.image_size, patch=patch)
        ]

    @property
    def torch_threads(self) -> int:
        return self.model_threads or max(1, (os.cpu_count() or 1) - self.threads)


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    try:
        config = tyro.cli(EndToEnd, args=arguments, description=__doc__)
        config.check()
        before = environment()
        torch.set_num_threads(config.torch_threads)
        sys.setswitchinterval(SWITCH_INTERVAL)
        rows = measure(config)
    finally:
        torch.set_num_threads(threads)
        sys.setswitchinterval(interval)
    print(format_end_to_end(rows))
    found: list[Crossing] = crossings(rows) if config.sweep else []
    if found:
        print(f"\n{format_crossings(found)}")
    if config.plot:
        draw_crossing(rows, config.plot)
        print(f"picture: {config.plot}")
    result = {"benchmark": "end_to_end", "environment": before, "rows": [asdict(row) for row in rows]}
    write_json(config.json, {**result, "crossings": [asdict(each) for each in found]})


def measure(config: EndToEnd) -> list[EndToEndRow]:
    """Returns a row for each geometry and decoder. Raises ValueError for what cannot be measured."""
    encoders = model_config(config.model)
    names: tuple[DecoderName, ...] = ("turbo", "dali") if config.decoder == "both" else (config.decoder,)
    found: list[EndToEndRow] = []
    for geometry in config.geometries(encoders):
        for decoder in names:
            print(f"measuring {config.model}, {geometry.tokens} tokens, {decoder}", file=sys.stderr, flush=True)
            found.append(_measure(config, encoders, geometry, decoder))
    return found


def _measure(config: EndToEnd, encoders: ModelConfig, geometry: Geometry, decoder: DecoderName) -> EndToEndRow:
    both = LoaderAndModel(config, encoders, geometry, decoder)
    loader: list[Turn] = []
    model: list[Turn] = []
    joint: list[Joint] = []
    turns: list[Any] = [
        lambda: loader.append(both.load()),
        lambda: model.append(both.stepper.run(config.steps)),
        lambda: joint.append(both.join()),
    ]
    # The first steps of a process meet memory that was never touched.
    both.stepper.run(2)
    for number in range(config.rounds):
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            turn()
    hidden = None
    if config.trace:
        # One file each, where there are several.
        several = config.sweep or config.decoder == "both"
        out = config.trace.with_stem(f"{config.trace.stem}-{geometry.tokens}-{decoder}") if several else config.trace
        with profiler() as stopped:
            marks = both.joined_marks()
        hidden = write_trace(stopped, marks, out)
        print(f"trace: {out}; steps hid {hidden:.1%} of the time in which batches were made", flush=True)
    return _row(config, geometry, decoder, loader, model, joint, hidden)


def _row(
    config: EndToEnd,
    geometry: Geometry,
    decoder: DecoderName,
    loader: Sequence[Turn],
    model: Sequence[Turn],
    joint: Sequence[Joint],
    hidden: float | None,
) -> EndToEndRow:
    cores = os.cpu_count() or 1
    triples = list(zip(loader, model, (each.turn for each in joint), strict=True))
    lesser = [min(one.images_per_s, other.images_per_s) for one, other, _ in triples]
    # Per image, all cores over what both need: no order of work on a CPU can be faster.
    shared = [cores / (1 / one.images_per_cpu_s + 1 / other.images_per_cpu_s) for one, other, _ in triples]
    together = [both.images_per_s for _, _, both in triples]
    steps = [step for each in joint for step in each.parts]
    parts = {part: spread([step[part] for step in steps]) for part in steps[0]}
    whole = [sum(step.values()) for step in steps]
    rates = {
        name: spread([turn.images_per_s for turn in turns]) for name, turns in (("loader", loader), ("model", model))
    }
    both = spread(together)
    return EndToEndRow(
        model=config.model,
        data=config.data.name,
        decoder=decoder,
        tokens=geometry.tokens,
        image_reduction=geometry.image_reduction,
        text_tokens=config.text_tokens,
        batch_size=config.batch_size,
        threads=config.threads,
        model_threads=config.torch_threads,
        device=config.device,
        images_per_s=both.median,
        images_per_s_range=(both.low, both.high),
        loader_images_per_s=rates["loader"].median,
        loader_images_per_s_range=(rates["loader"].low, rates["loader"].high),
        model_images_per_s=rates["model"].median,
        model_images_per_s_range=(rates["model"].low, rates["model"].high),
        loader_images_per_cpu_s=statistics.median(turn.images_per_cpu_s for turn in loader),
        model_images_per_cpu_s=statistics.median(turn.images_per_cpu_s for turn in model),
        bound_by="loader" if rates["loader"].median < rates["model"].median else "model",
        over_lesser=spread([own / least for own, least in zip(together, lesser, strict=True)]),
        over_bound=spread([own / min(least, most) for own, least, most in zip(together, lesser, shared, strict=True)])
        if config.device == "cpu"
        else None,
        data_wait_fraction=statistics.median(
            step["data_wait"] / total for step, total in zip(steps, whole, strict=True)
        ),
        parts_ms={part: value.median for part, value in parts.items()},
        parts_ms_range={part: (value.low, value.high) for part, value in parts.items()},
        hidden_fraction=hidden,
    )


if __name__ == "__main__":
    sys.exit(main())
