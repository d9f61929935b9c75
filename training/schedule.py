"""The learning rate as a pure function of the pairs seen, so that batch size and resuming change nothing of it."""

import math


def learning_rate(samples_seen: int, *, peak: float, warmup_samples: int, total_samples: int) -> float:
    """Returns the rate for the step that begins after `samples_seen` pairs.

    Linear from 0 to `peak` over the warm-up, then a cosine to 0 at `total_samples` (CLIPA, arXiv 2305.07017, appendix).
    """
    if samples_seen < warmup_samples:
        return peak * samples_seen / warmup_samples
    progress = (samples_seen - warmup_samples) / max(1, total_samples - warmup_samples)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
