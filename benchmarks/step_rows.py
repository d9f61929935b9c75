"""What the rounds of the step benchmark gave in, its rows out."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model.clip import gflops_per_pair
from model.presets import ModelConfig
from pipeline.tokens import Geometry

from .loader_rounds import OPEN_CLIP
from .step_gemm import GemmRates, data_sheet_gflop_per_s
from .step_model import Stepper, Turn
from .step_report import GivenRow, PeerRow, StepRow, spread

if TYPE_CHECKING:
    from .step import StepBenchmark


@dataclass
class Rounds:
    """What each round of one geometry gave."""

    ours: list[Turn]
    parts: list[dict[str, float]]
    gemm: list[GemmRates]
    theirs: list[Turn]
    without: dict[str, list[Turn]]


def step_row(
    config: "StepBenchmark",
    encoders: ModelConfig,
    geometry: Geometry,
    stepper: Stepper,
    rounds: Rounds,
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


def peer_row(row: StepRow, rounds: Rounds, square: Sequence[float], steps: int) -> PeerRow:
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


def given_row(row: StepRow, name: str, ours: Sequence[Turn], turns: Sequence[Turn]) -> GivenRow:
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
