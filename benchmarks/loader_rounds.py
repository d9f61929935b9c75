"""Contenders take turns, round after round, so that all see the same machine; medians, ranges and ratios come out.

A round of each lasts about equally long in CPU time. Ratios are taken inside a round and their median after, so slow
drift of a shared machine leaves them alone.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .contenders import Contender, Round
from .peer_process import Skipped

OPEN_CLIP, STOCK, BARE_SCALED, BARE_FULL = "open_clip", "DALI stock", "bare decode, scaled", "bare decode, full"


@dataclass(frozen=True)
class Figure:
    """One contender's medians over the rounds."""

    images_per_cpu_s: float
    images_per_cpu_s_range: tuple[float, float]
    images_per_s: float
    stage_us: dict[str, float]
    """CPU time an image spends in each stage; empty for what is not our loader."""
    over_open_clip: float | None
    """images_per_cpu_s as a multiple of open_clip's, same round; None where that did not run."""
    of_limit: float | None
    """images_per_cpu_s as a share of what bare scaled decoding of the same bytes reaches; None where not measured."""


def batches_for(contender: Contender, batch_size: int, seconds: float) -> int:
    """Returns how many batches take about `seconds` of CPU time. Warms the contender up: files, tables, buffers."""
    contender.run(1)
    images = contender.run(1)
    return max(1, round(seconds * images.per_cpu_s / batch_size))


def take_turns(
    contenders: Mapping[str, Contender], batches: Mapping[str, int], rounds: int
) -> tuple[dict[str, list[Round]], dict[str, str]]:
    """Returns each contender's rounds, and why others have none: one that dies in any round is left out of all.

    The order turns round too: nobody always runs after the same other.
    """
    names = list(contenders)
    done: dict[str, list[Round]] = {name: [] for name in names}
    dropped: dict[str, str] = {}
    for turn in range(rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            if name in dropped:
                continue
            try:
                done[name].append(contenders[name].run(batches[name]))
            except Skipped as reason:
                dropped[name] = f"it died in round {turn + 1}: {reason}"
                del done[name]
    return done, dropped


def figures(rounds: Mapping[str, Sequence[Round]]) -> dict[str, Figure]:
    """Returns the medians of each contender, and its ratios to open_clip and to the limit where those took part."""
    return {
        name: Figure(
            images_per_cpu_s=statistics.median(each.per_cpu_s for each in turns),
            images_per_cpu_s_range=(min(each.per_cpu_s for each in turns), max(each.per_cpu_s for each in turns)),
            images_per_s=statistics.median(each.images / each.wall_s for each in turns),
            stage_us={stage: statistics.median(each.stage_us[stage] for each in turns) for stage in turns[0].stage_us},
            over_open_clip=ratio(turns, rounds.get(OPEN_CLIP)),
            of_limit=ratio(turns, rounds.get(BARE_SCALED)),
        )
        for name, turns in rounds.items()
    }


def ratio(ours: Sequence[Round], theirs: Sequence[Round] | None) -> float | None:
    """Returns the median over the rounds of ours per CPU second to theirs; None without theirs."""
    if theirs is None:
        return None
    return statistics.median(one.per_cpu_s / other.per_cpu_s for one, other in zip(ours, theirs, strict=True))


def slowest_stage(stage_us: Mapping[str, float]) -> str:
    """Returns the name of the stage that costs most."""
    return max(stage_us, key=lambda stage: stage_us[stage] if math.isfinite(stage_us[stage]) else 0.0)
