"""How long a sweep will take: from its finished points where there are some, else from a short probe of each model.

The probe times real passes of the encoders on made-up pairs, forward and backward, and the optimiser's step apart,
since that costs the same whatever the batch. Decoding, start-up and evaluation come on top as a fixed time a process.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from model.clip import CLIP
from model.loss import contrastive_loss
from model.presets import model_config
from training import optim
from training.config import resolved_device
from training.fields import Config

from .scaling_sweep import STAGES, Point, Sweep, config_of

PROBE_PAIRS = 32
START_S = 10.0
"""Of one process: imports, opening data, the last checkpoint."""


@dataclass(frozen=True)
class Estimate:
    """Wall seconds of a point, and what says so."""

    seconds: float
    source: str
    """`measured`: the same point of another seed. `scaled`: finished points of the model. `probe`."""


def estimates(
    sweep: Sweep, there: Mapping[str, Mapping[str, Any]], device: str, tell: Callable[[str], None]
) -> dict[str, Estimate]:
    """Returns an estimate for each point that is not finished, by name."""
    done = [row for row in there.values() if row["wall_s"] is not None]
    probed: dict[tuple[str, int, int], tuple[float, float]] = {}
    found: dict[str, Estimate] = {}
    for point in sweep.points:
        if point.name in there:
            continue
        twins = [row["wall_s"] for row in done if _kind(row) == _kind(point.record())]
        siblings = [row["wall_s"] / row["gflops"] for row in done if row["model"] == point.model]
        if twins:
            found[point.name] = Estimate(statistics.mean(twins), "measured")
        elif siblings:
            found[point.name] = Estimate(statistics.median(siblings) * point.total_gflops, "scaled")
        else:
            found[point.name] = Estimate(_probed(point, len(sweep.evaluation), device, probed, tell), "probe")
    return found


def _probed(
    point: Point,
    num_sets: int,
    device: str,
    known: dict[tuple[str, int, int], tuple[float, float]],
    tell: Callable[[str], None],
) -> float:
    seconds = START_S * (len(STAGES) + num_sets)
    for stage in STAGES:
        config = config_of(point, stage)
        key = (config.model, config.tokens, config.text_tokens)
        if key not in known:
            tell(f"probing {config.model} at {config.tokens} + {config.text_tokens} tokens")
            known[key] = probe(config, device)
        pair_s, step_s = known[key]
        seconds += config.total_steps * (config.batch_size * pair_s + step_s)
    return seconds


def probe(config: Config, device: str) -> tuple[float, float]:
    """Returns seconds of a pair, forward and backward, and of one step of the optimiser."""
    encoders, where = model_config(config.model), torch.device(resolved_device(device, cuda=torch.cuda.is_available()))
    model = CLIP(encoders, grid=config.geometry.grid, text_tokens=config.text_tokens, attention=config.attention).to(
        where
    )
    optimizer = optim.build(
        model, weight_decay=config.weight_decay, beta2=config.beta2, eps=encoders.adam_eps, decayed=encoders.decayed
    )
    patches = torch.randint(256, (PROBE_PAIRS, config.tokens, encoders.image.patch_values), dtype=torch.uint8)
    positions = torch.arange(config.tokens, dtype=torch.int16).expand(PROBE_PAIRS, -1)
    captions = torch.randint(1000, (PROBE_PAIRS, config.text_tokens), dtype=torch.int32)
    inputs = (patches.to(where), positions.to(where), captions.to(where))
    valid = torch.ones(PROBE_PAIRS, dtype=torch.bool, device=where)

    def passes() -> None:
        contrastive_loss(model(*inputs), valid, kind=config.loss).backward()  # pyright: ignore[reportUnknownMemberType]

    pair_s: list[float] = []
    step_s: list[float] = []
    for _ in range(5):
        optimizer.zero_grad()
        pair_s.append(_seconds(passes, where))
        step_s.append(_seconds(optimizer.step, where))
    # The quickest: the first pass pays for what is set up once, and others may be on the machine.
    return min(pair_s) / PROBE_PAIRS, min(step_s)


def _seconds(call: Callable[[], Any], where: torch.device) -> float:
    started = time.perf_counter()
    call()
    if where.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _kind(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("model", "tokens", "image_reduction", "text_tokens"))


def total(found: Sequence[Estimate]) -> float:
    """Returns seconds of all points together."""
    return sum(estimate.seconds for estimate in found)
