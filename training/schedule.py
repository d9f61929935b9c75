"""The learning rate as a pure function of the pairs seen, so that batch size and resuming change nothing of it."""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .fields import Config


def schedule_of(config: "Config") -> Callable[[int], float]:
    """Returns a resolved config's learning rate for the step that begins after so many pairs."""
    peak, warmup, total = config.lr, config.warmup_samples, config.samples
    assert peak is not None
    assert warmup is not None
    assert total is not None
    return functools.partial(learning_rate, peak=peak, warmup_samples=warmup, total_samples=total)


def learning_rate(samples_seen: int, *, peak: float, warmup_samples: int, total_samples: int) -> float:
    """Returns the rate for the step that begins after `samples_seen` pairs.

    Linear from 0 to `peak` over the warm-up, then a cosine to 0 at `total_samples` (CLIPA, arXiv 2305.07017, appendix).
    """
    if samples_seen < warmup_samples:
        return peak * samples_seen / warmup_samples
    progress = (samples_seen - warmup_samples) / max(1, total_samples - warmup_samples)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
