"""Results of a sweep in: how far each model falls behind its own full length, and the tokens it needs to stay near it.

A drop is taken between runs of one model, text length and seed, so what a seed does to both cancels. The curve is
drop(n) = a ((N / n)^b - 1), which is 0 at the full length N; two numbers, so it is fitted to three lengths or more.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

MIN_LENGTHS = 3
"""Shorter lengths that a fit needs."""
_EXPONENTS = np.linspace(0.05, 4, 396)


@dataclass(frozen=True)
class Measurement:
    """One finished point on one shard set."""

    model: str
    image_reduction: str
    tokens: int
    text_tokens: int
    seed: int
    accuracy: float
    """Percent."""
    gflops: float
    cpu_s: float | None
    wall_s: float | None


@dataclass(frozen=True)
class Curve:
    """A fitted drop."""

    a: float
    b: float
    full_tokens: int
    shortest: int
    """The smallest length that was fitted: below it the curve says nothing."""
    residual: float
    """Root mean square of measured less fitted drops, in points."""

    def drop(self, tokens: float) -> float:
        """Returns points below the full length."""
        return self.a * ((self.full_tokens / tokens) ** self.b - 1)

    def tokens_within(self, points: float) -> float:
        """Returns the tokens at which the drop is `points`; never fewer than the shortest length measured."""
        if self.drop(self.shortest) <= points:
            return float(self.shortest)
        return self.full_tokens / (1 + points / self.a) ** (1 / self.b)


@dataclass(frozen=True)
class Needed:
    """How many tokens a model needs to stay within some points of its full length, over seeds; or why nobody knows."""

    per_seed: Mapping[int, float]
    shortest: int
    """Values at it mean: that few, or fewer."""
    reason: str = ""
    """Empty where there is a fit."""

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        low, middle, high = (
            min(self.per_seed.values()),
            statistics.mean(self.per_seed.values()),
            max(self.per_seed.values()),
        )
        if high <= self.shortest:
            return f"{self.shortest} or fewer"
        return f"{middle:.0f}" + (f" ({low:.0f} to {high:.0f})" if len(self.per_seed) > 1 else " (one seed)")


def drops(
    measurements: Iterable[Measurement], full_tokens: int
) -> dict[tuple[str, str, int], dict[int, dict[int, float]]]:
    """Returns (model, reduction, text tokens) -> tokens -> seed -> points below the full length of that seed.

    Points whose full length is not there yet are left out.
    """
    known = list(measurements)
    base = {
        (one.model, one.text_tokens, one.seed): one.accuracy
        for one in known
        if one.tokens == full_tokens and one.image_reduction == "resize"
    }
    found: dict[tuple[str, str, int], dict[int, dict[int, float]]] = {}
    for one in known:
        full = base.get((one.model, one.text_tokens, one.seed))
        if full is not None and one.tokens < full_tokens:
            lengths = found.setdefault((one.model, one.image_reduction, one.text_tokens), {})
            lengths.setdefault(one.tokens, {})[one.seed] = full - one.accuracy
    return {key: dict(sorted(lengths.items())) for key, lengths in sorted(found.items())}


def fit(lengths: Mapping[int, float], full_tokens: int) -> Curve | None:
    """Returns the least-squares curve through tokens -> drop; None for fewer than MIN_LENGTHS shorter lengths."""
    tokens = np.array(sorted(n for n in lengths if n < full_tokens), np.float64)
    if len(tokens) < MIN_LENGTHS:
        return None
    measured = np.array([lengths[int(n)] for n in tokens])
    shapes = (full_tokens / tokens) ** _EXPONENTS[:, None] - 1
    # For each exponent the best factor has a closed form; a model that gains from fewer tokens has drop 0.
    factors = np.maximum((shapes * measured).sum(1) / (shapes**2).sum(1), 0)
    errors = ((factors[:, None] * shapes - measured) ** 2).mean(1)
    best = int(errors.argmin())
    return Curve(
        float(factors[best]), float(_EXPONENTS[best]), full_tokens, int(tokens[0]), float(np.sqrt(errors[best]))
    )


def needed(lengths: Mapping[int, Mapping[int, float]], full_tokens: int, points: float) -> Needed:
    """Returns the tokens needed to stay within `points`, a fit for each seed. lengths: tokens -> seed -> drop."""
    seeds = sorted({seed for of_seed in lengths.values() for seed in of_seed})
    shortest = min(lengths, default=full_tokens)
    curves = {
        seed: fit({n: of_seed[seed] for n, of_seed in lengths.items() if seed in of_seed}, full_tokens)
        for seed in seeds
    }
    fitted = {seed: curve for seed, curve in curves.items() if curve is not None}
    if not fitted:
        return Needed({}, shortest, f"no fit: {_lengths(lengths)}, {MIN_LENGTHS} are needed")
    worst = max(curve.residual for curve in fitted.values())
    if worst > points:
        return Needed({}, shortest, f"no fit: the points lie {worst:.1f} off the curve")
    return Needed({seed: curve.tokens_within(points) for seed, curve in fitted.items()}, shortest)


def mean_and_range(values: Sequence[float]) -> tuple[float, float, float]:
    """Returns mean, smallest and largest."""
    return statistics.mean(values), min(values), max(values)


def _lengths(lengths: Mapping[int, object]) -> str:
    return f"{len(lengths)} shorter length{'s' if len(lengths) != 1 else ''} of a seed"
