"""A training step, model alone, on cached batches: `python -m benchmarks.step --model ViT-B-16 --tokens 16`.

Prints the milliseconds of each part, images/s, and how near that is to this device's own rate of matrix products of the
same shapes, measured in the same process. `--peer open_clip` lets open_clip's own model, loss and AdamW take turns with
ours, round after round, at the same sizes and threads (`make peers`). `--parts` switches off, one at a time, what makes
the step fast. `--sweep` goes through tokens from 4 to 196 by strategy.

Under load, look at ratios by CPU time: both processes then wait for cores, and rounds by the clock tell little.
"""

import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

# As train.py: set before torch loads. Threads that spin while they wait would count as work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import tyro

from model.clip import gflops_per_pair
from model.presets import ModelConfig, model_config
from pipeline.tokens import Geometry, ImageReduction, token_geometry

from .contenders import PEERS_PYTHON, Skipped
from .environment import environment
from .loader_rounds import OPEN_CLIP
from .step_contender import OpenClipStep
from .step_gemm import GemmMeter, GemmRates, data_sheet_gflop_per_s, gemms
from .step_model import SWITCHES, Stepper, Turn, made_batches, real_batches
from .step_report import (
    GivenRow,
    PeerRow,
    StepRow,
    draw_step_plot,
    format_given,
    format_parts,
    format_steps,
    spread,
)

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


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what the user can mend."""
    try:
        config = tyro.cli(StepBenchmark, args=arguments, description=__doc__)
        config.check()
        before = environment()
        _warn_of_load()
        found = measure(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, reason in found.skipped.items():
        print(f"{name} is left out: {reason}")
    print(f"{format_steps(found.rows, found.peers)}\n\n{format_parts(found.rows)}")
    if found.given:
        print(f"\n{format_given(found.given)}")
    if config.plot:
        draw_step_plot(found.rows, config.plot)
        print(f"picture: {config.plot}")
    if config.json:
        result = {"benchmark": "step", "environment": before, "precision": config.precision, **asdict(found)}
        config.json.parent.mkdir(parents=True, exist_ok=True)
        config.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def _warn_of_load() -> None:
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(
            f"load average {load:.1f} on {cores} cores: rates by the clock mean little; look at those by CPU time, "
            "or run this on a quiet machine",
            file=sys.stderr,
        )


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


@dataclass
class _Rounds:
    """What each round of one geometry gave."""

    ours: list[Turn]
    parts: list[dict[str, float]]
    gemm: list[GemmRates]
    theirs: list[Turn]
    without: dict[str, list[Turn]]


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
    row = _row(config, encoders, geometry, stepper, rounds, executed)
    found.rows.append(row)
    if rounds.theirs and peer:
        found.peers.append(_peer_row(row, rounds, peer.square_gflop_per_s, config.steps))
    for name, turns in rounds.without.items():
        found.given.append(_given_row(row, name, rounds.ours, turns))


def _take_turns(
    config: StepBenchmark, stepper: Stepper, meter: GemmMeter, peer: OpenClipStep | None, found: StepFound
) -> _Rounds:
    """Everyone once a round, one after the other, the order turning; nobody runs beside another."""
    rounds = _Rounds([], [], [], [], {})
    turns: list[Callable[[], None]] = [
        lambda: rounds.ours.append(stepper.run(config.steps)),
        lambda: rounds.parts.extend(stepper.run_parts(config.steps)),
        lambda: rounds.gemm.append(meter.measure()),
    ]
    if peer is not None:
        turns.append(lambda: rounds.theirs.append(peer.run(config.steps)))
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
    if peer is not None:
        try:
            peer.run(2)
        except Skipped as reason:
            found.skipped[OPEN_CLIP] = str(reason)
            turns = [turn for turn in turns if turn is not turns[3]]
        peer.square_gflop_per_s.clear()
    for number in range(config.rounds):
        first = number % len(turns)
        for turn in turns[first:] + turns[:first]:
            turn()
    return rounds


def _run_without(stepper: Stepper, switch: Any, steps: int, rounds: _Rounds) -> None:
    with stepper.without(switch):
        rounds.without[f"without {switch}"].append(stepper.run(steps))


def _row(
    config: StepBenchmark,
    encoders: ModelConfig,
    geometry: Geometry,
    stepper: Stepper,
    rounds: _Rounds,
    executed_gflop: float,
) -> StepRow:
    turns, batch = rounds.ours, config.batch_size
    model_gflop = 3 * sum(gflops_per_pair(encoders, geometry.tokens, config.text_tokens)) * batch
    seconds = [turn.wall_s / config.steps for turn in turns]
    step_s = statistics.median(seconds)
    parts = {part: spread([each[part] for each in rounds.parts]) for part in rounds.parts[0]}
    peak = data_sheet_gflop_per_s(stepper.device, torch.bfloat16 if config.precision == "bf16" else torch.float32)
    cpu_s = [turn.cpu_s / config.steps for turn in turns]
    by_cpu = [rates.model_per_cpu_s for rates in rounds.gemm]
    rate = spread([turn.images_per_s for turn in turns])
    return StepRow(
        contender="ours, compiled" if config.compile else "ours",
        model=config.model,
        tokens=geometry.tokens,
        image_reduction=geometry.image_reduction,
        image_size=geometry.image_size,
        text_tokens=config.text_tokens,
        batch_size=batch,
        device=config.device,
        threads=torch.get_num_threads(),
        images_per_s=rate.median,
        images_per_s_range=(rate.low, rate.high),
        images_per_cpu_s=statistics.median(turn.images_per_cpu_s for turn in turns),
        tokens_per_s=rate.median * (geometry.tokens + config.text_tokens),
        step_ms=1e3 * step_s,
        step_ms_range=(1e3 * min(seconds), 1e3 * max(seconds)),
        parts_ms={part: value.median for part, value in parts.items()},
        parts_ms_range={part: (value.low, value.high) for part, value in parts.items()},
        parts_over_step=statistics.median(sum(each.values()) for each in rounds.parts) / (1e3 * step_s),
        model_gflop=model_gflop,
        executed_gflop=executed_gflop,
        gflop_per_s=model_gflop / step_s,
        executed_gflop_per_s=executed_gflop / step_s,
        gemm_gflop_per_s=statistics.median(rates.model for rates in rounds.gemm),
        square_gflop_per_s=statistics.median(rates.square for rates in rounds.gemm),
        mfu_of_gemm_rate=statistics.median(
            model_gflop / own / rates.model for own, rates in zip(seconds, rounds.gemm, strict=True)
        ),
        executed_of_gemm_rate=statistics.median(
            executed_gflop / own / rates.model for own, rates in zip(seconds, rounds.gemm, strict=True)
        ),
        executed_of_gemm_rate_by_cpu=statistics.median(
            executed_gflop / own / rate for own, rate in zip(cpu_s, by_cpu, strict=True) if rate is not None
        )
        if None not in by_cpu
        else None,
        mfu_of_data_sheet=None if peak is None else model_gflop / step_s / peak,
        peak_memory_bytes=stepper.peak_memory_bytes(),
    )


def _peer_row(row: StepRow, rounds: _Rounds, square: Sequence[float], steps: int) -> PeerRow:
    rate = spread([turn.images_per_s for turn in rounds.theirs])
    step_s = statistics.median(turn.wall_s for turn in rounds.theirs) / steps
    return PeerRow(
        contender=OPEN_CLIP,
        model=row.model,
        tokens=row.tokens,
        image_reduction=row.image_reduction,
        text_tokens=row.text_tokens,
        batch_size=row.batch_size,
        images_per_s=rate.median,
        images_per_s_range=(rate.low, rate.high),
        images_per_cpu_s=statistics.median(turn.images_per_cpu_s for turn in rounds.theirs),
        step_ms=1e3 * step_s,
        gflop_per_s=row.model_gflop / step_s,
        square_gflop_per_s=statistics.median(square),
        ours_over_open_clip=spread(
            [one.images_per_s / other.images_per_s for one, other in zip(rounds.ours, rounds.theirs, strict=True)]
        ),
        ours_over_open_clip_by_cpu=spread(
            [
                one.images_per_cpu_s / other.images_per_cpu_s
                for one, other in zip(rounds.ours, rounds.theirs, strict=True)
            ]
        ),
    )


def _given_row(row: StepRow, name: str, ours: Sequence[Turn], turns: Sequence[Turn]) -> GivenRow:
    return GivenRow(
        model=row.model,
        tokens=row.tokens,
        batch_size=row.batch_size,
        change=name,
        images_per_s=statistics.median(turn.images_per_s for turn in turns),
        images_per_cpu_s=statistics.median(turn.images_per_cpu_s for turn in turns),
        speed=spread([turn.images_per_s / one.images_per_s for one, turn in zip(ours, turns, strict=True)]),
        speed_by_cpu=spread(
            [turn.images_per_cpu_s / one.images_per_cpu_s for one, turn in zip(ours, turns, strict=True)]
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
