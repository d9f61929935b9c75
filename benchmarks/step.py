"""A training step, model alone, on cached batches: `python -m benchmarks.step --model ViT-B-16 --tokens 16`.

Prints the milliseconds of each part, images/s, and how near that is to this device's own rate of matrix products of the
same shapes, measured in the same process. `--peer open_clip` lets open_clip's own model, loss and AdamW take turns with
ours, round after round, at the same sizes and threads (`make peers`). `--parts` switches off, one at a time, what makes
the step fast. `--sweep` goes through tokens from 4 to 196 by strategy.

Under load, look at ratios by CPU time: both processes then wait for cores, and rounds by the clock tell little.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# As train.py: set before torch loads. Threads that spin while they wait would count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tyro

from model.presets import ModelConfig, model_config
from pipeline.command import exit_code
from pipeline.tokens import Geometry, ImageReduction, token_geometry

from .command import write_json
from .environment import environment, warn_of_load
from .loader_rounds import OPEN_CLIP
from .peer_process import PEERS_PYTHON, Skipped
from .step_contender import OpenClipStep
from .step_gemm import GemmMeter, gemms
from .step_model import Stepper, made_batches, real_batches
from .step_report import (
    GivenRow,
    PeerRow,
    StepRow,
    draw_step_plot,
    format_given,
    format_parts,
    format_steps,
)
from .step_rows import Rounds, given_row, peer_row, step_row
from .step_switches import SWITCHES, Switch, without

_COMPILED = "with torch.compile"


@dataclass(frozen=True)
class StepBenchmark:
    """Measure a training step: model, loss and optimiser, without the loader."""

    model: str = "ViT-B-16"
    tokens: int = 16
    image_reduction: ImageReduction = "resize"
    image_size: int | None = None
    text_tokens: int = 16
    batch_size: int = 64
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    attention: Literal["auto", "sdpa", "flash", "xformers", "math"] = "auto"
    compile: bool = False
    """Ours with torch.compile."""
    threads: int | None = None
    """Of torch, in both processes; default: as many as cores."""
    data: Path | None = None
    """A folder of shards to take the batches from; default: random pixels and captions."""
    rounds: int = 5
    steps: int = 2
    """Of each contender in a round."""
    peer: Literal["open_clip"] | None = None
    peers_python: Path = PEERS_PYTHON
    """The Python that has open_clip."""
    parts: bool = False
    """Also measure the step with one thing switched off at a time."""
    sweep: bool = False
    """Instead of --tokens: 4 to 196 by resizing, and 16 to 98 of 196 by masking."""
    json: Path | None = None
    """Write the rows here."""
    plot: Path | None = None
    """Draw images/s against tokens and the shares of the parts as this PNG."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name in ("batch_size", "rounds", "steps", "text_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"--threads {self.threads} is below 1; leave it out for one a core")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no CUDA device here; --device cpu measures this machine")
        if self.peer and (self.device, self.precision) != ("cpu", "fp32"):
            raise ValueError("--peer open_clip is measured on the CPU in fp32; leave --device and --precision out")
        if self.parts and self.compile:
            raise ValueError("--parts measures --compile as one of its rows; leave --compile out")
        if self.sweep and (self.tokens, self.image_reduction, self.image_size) != (16, "resize", None):
            raise ValueError("--sweep has its own tokens; leave --tokens, --image-reduction and --image-size out")

    def geometries(self, config: ModelConfig) -> list[Geometry]:
        """Returns what is measured. Raises ValueError for what cannot be."""
        patch = config.image.patch
        if not self.sweep:
            return [
                token_geometry(
                    self.tokens, image_reduction=self.image_reduction, image_size=self.image_size, patch=patch
                )
            ]
        side = 14 * patch
        masked: tuple[tuple[int, ImageReduction], ...] = (
            (16, "random"),
            (49, "random"),
            (49, "grid"),
            (49, "block"),
            (98, "random"),
            (98, "grid"),
        )
        return [
            *(token_geometry(n, patch=patch) for n in (4, 9, 16, 25, 36, 49, 100, 196)),
            *(token_geometry(n, image_reduction=how, image_size=side, patch=patch) for n, how in masked),
        ]


@dataclass(frozen=True)
class StepFound:
    """What a run of the benchmark found."""

    rows: list[StepRow]
    peers: list[PeerRow]
    given: list[GivenRow]
    """What each switch gives."""
    skipped: dict[str, str]
    """Contender -> why it did not run."""
    about: dict[str, Any]
    """open_clip's versions."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the benchmark."""
    config = tyro.cli(StepBenchmark, args=arguments, description=__doc__)
    config.check()
    before = environment()
    warn_of_load("rates by the clock mean little; look at those by CPU time, or run this on a quiet machine")
    found = measure(config)
    for name, reason in found.skipped.items():
        print(f"{name} is left out: {reason}")
    print(f"{format_steps(found.rows, found.peers)}\n\n{format_parts(found.rows)}")
    if found.given:
        print(f"\n{format_given(found.given)}")
    if config.plot:
        draw_step_plot(found.rows, config.plot)
        print(f"picture: {config.plot}")
    about = {"benchmark": "step", "environment": before, "precision": config.precision}
    write_json(config.json, {**about, **asdict(found)})


def measure(config: StepBenchmark) -> StepFound:
    """Returns the rows of every geometry. Raises ValueError for what cannot be measured."""
    encoders = model_config(config.model)
    geometries = config.geometries(encoders)
    found = StepFound([], [], [], {}, {})
    before = torch.get_num_threads()
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    try:
        for geometry in geometries:
            print(
                f"measuring {config.model}, {geometry.tokens} tokens by {geometry.image_reduction}, "
                f"batch {config.batch_size}",
                file=sys.stderr,
                flush=True,
            )
            _measure_geometry(config, encoders, geometry, found)
    finally:
        torch.set_num_threads(before)
    return found


def _measure_geometry(config: StepBenchmark, encoders: ModelConfig, geometry: Geometry, found: StepFound) -> None:
    sizes = (encoders, geometry, config.batch_size, config.text_tokens)
    batches = real_batches(*sizes, config.data) if config.data else made_batches(*sizes)
    device = torch.device(config.device)
    stepper = Stepper(
        encoders,
        batches,
        device=device,
        precision=config.precision,
        attention=config.attention,
        compiled=config.compile,
    )
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    products = gemms(encoders, config.batch_size, geometry.tokens, config.text_tokens)
    meter = GemmMeter(products, device, dtype)
    peer = None
    if config.peer:
        try:
            peer = OpenClipStep(
                encoders, geometry, config.batch_size, config.text_tokens, torch.get_num_threads(), config.peers_python
            )
            found.about.update(peer.about)
        except Skipped as reason:
            found.skipped[OPEN_CLIP] = str(reason)
    try:
        rounds = _take_turns(config, stepper, meter, peer, found)
    finally:
        if peer:
            peer.close()
    executed = sum(product.step_flops for product in products) / 1e9
    row = step_row(config, encoders, geometry, stepper, rounds, executed)
    found.rows.append(row)
    if rounds.theirs and peer:
        found.peers.append(peer_row(row, rounds, peer.square_gflop_per_s, config.steps))
    for name, turns in rounds.without.items():
        found.given.append(given_row(row, name, rounds.ours, turns))


def _take_turns(
    config: StepBenchmark, stepper: Stepper, meter: GemmMeter, peer: OpenClipStep | None, found: StepFound
) -> Rounds:
    """Everyone once a round, one after the other, the order turning; nobody runs beside another."""
    rounds = Rounds([], [], [], [], {})
    living = peer

    def peers_turn() -> None:
        nonlocal living
        if living is None:
            return
        try:
            rounds.theirs.append(living.run(config.steps))
        except Skipped as reason:
            found.skipped[OPEN_CLIP] = str(reason)
            rounds.theirs.clear()
            living = None

    turns: list[Callable[[], None]] = [
        lambda: rounds.ours.append(stepper.run(config.steps)),
        lambda: rounds.parts.extend(stepper.run_parts(config.steps)),
        lambda: rounds.gemm.append(meter.measure()),
        peers_turn,
    ]
    if config.parts:
        for switch in SWITCHES:
            rounds.without[f"without {switch}"] = []
            turns.append(lambda switch=switch: _run_without(stepper, switch, config.steps, rounds))
        compiled = stepper.compiled_twin()
        try:
            compiled.run(2)
        except RuntimeError as error:  # no compiler on this machine, for one
            found.skipped[_COMPILED] = str(error).strip().split("\n")[0]
        else:
            rounds.without[_COMPILED] = []
            turns.append(lambda: rounds.without[_COMPILED].append(compiled.run(config.steps)))
    # The first steps of a process meet memory that was never touched.
    stepper.run(2)
    meter.measure()
    peers_turn()
    rounds.theirs.clear()
    if peer is not None:
        peer.square_gflop_per_s.clear()
    for number in range(config.rounds):
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            turn()
    return rounds


def _run_without(stepper: Stepper, switch: Switch, steps: int, rounds: Rounds) -> None:
    with without(stepper, switch):
        rounds.without[f"without {switch}"].append(stepper.run(steps))


if __name__ == "__main__":
    sys.exit(main())
