"""Several sources in fixed shares (`--data A=0.7 B=0.3`): pure, step -> which sample of which source in which slot.

Each lane takes its slots from the sources in turn, as evenly as whole samples allow, and each source goes through its
own lanes at its own pace, epoch after epoch. How many of a lane's first n slots belong to a source has a closed form,
so any step may be asked for alone, and any world size that divides the lanes sees the same global batches.

The form for two sources, of which the first has share p: floor(n * p + phase) of the first n slots are its own (a
Sturmian sequence), so that over any stretch of a lane it is less than one sample off. Phases are spread evenly over
the lanes, so all lanes together are less than one sample off too (Hermite's identity). More sources are a tree of such
splits.
"""

import heapq
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .order import IntArray, Lanes, Order, Slots, check_batch, lanes_of_rank

MIN_SHARE = 1e-6
"""Shares are kept to 2**-32; a smaller one than this would be off by much of itself."""

_BITS = 32
_GOLDEN = 0x9E3779B9  # the golden ratio's fraction, times 2**32


def split_weights(data: Sequence[str]) -> tuple[list[str], list[float] | None]:
    """Returns the sources that --data names and their shares, which sum to 1; None for one source or no weights.

    SRC=WEIGHT is cut at its last "=" if a number follows and no file or folder has the whole as its name; a URL that
    ends so takes a "/" behind it. Raises ValueError for weights that cannot be, and where only some sources have one.
    """
    parts = [_split(item) for item in data]
    sources, weights = [source for source, _ in parts], [weight for _, weight in parts if weight is not None]
    if weights and len(weights) < len(parts):
        bare = next(source for source, weight in parts if weight is None)
        raise ValueError(f"--data {bare} has no weight and others have one; give each SRC=WEIGHT, or none")
    for item, weight in zip(data, weights, strict=False):
        if not 0 < weight < math.inf:
            raise ValueError(f"--data {item}: its weight is not a positive, finite number; give one, as in SRC=0.5")
    if len(weights) < 2:
        return sources, None
    # By the largest first: the sum of finite numbers need not be finite.
    scaled = [weight / max(weights) for weight in weights]
    shares = [weight / math.fsum(scaled) for weight in scaled]
    for item, share in zip(data, shares, strict=True):
        if share < MIN_SHARE:
            raise ValueError(f"--data {item}: a share of {share:.2g} is below {MIN_SHARE:g}; raise it or leave it out")
    return sources, shares


def _split(item: str) -> tuple[str, float | None]:
    source, equals, number = item.rpartition("=")
    if not (source and equals) or "_" in number or os.path.exists(item):  # Python reads 1_0 as 10
        return item, None
    try:
        return source, float(number)
    except ValueError:
        return item, None


def by_source(shard_sizes: IntArray, source_shards: Sequence[int]) -> list[IntArray]:
    """Returns the shard sizes of each source."""
    return np.split(shard_sizes, np.cumsum(source_shards)[:-1])


def make_order(
    shard_sizes: IntArray,
    source_shards: Sequence[int],
    shares: Sequence[float] | None,
    *,
    batch_size: int,
    seed: int,
    lanes: int,
    resampled: bool = False,
) -> "Order | Mixture":
    """Returns the order of an index's shards: one over all of them, or of its sources in the given shares.

    source_shards: how many of the shards each source has. Raises ValueError where batch, lanes and data do not fit.
    """
    if shares is None:
        return Order(shard_sizes, batch_size=batch_size, seed=seed, lanes=lanes, resampled=resampled)
    return Mixture(
        by_source(shard_sizes, source_shards),
        shares,
        batch_size=batch_size,
        seed=seed,
        lanes=lanes,
        resampled=resampled,
    )


class Mixture:
    """The batches of several sources in fixed shares. Any step may be asked for, in any sequence, by any thread.

    Shards are numbered over all sources in order. Within an exhaustive epoch of a source each of its usable samples
    appears exactly once, apart from those that equal lanes cannot hold (other ones in each epoch).
    """

    def __init__(
        self,
        shard_sizes: Sequence[npt.ArrayLike],
        shares: Sequence[float],
        *,
        batch_size: int,
        seed: int,
        lanes: int,
        window_shards: int = 4,
        resampled: bool = False,
    ) -> None:
        """shard_sizes: of each source, the usable samples of its shards. shares: positive, one a source.

        Raises ValueError where batch, lanes and data do not fit. A source may be smaller than a batch.
        """
        check_batch(batch_size, lanes)
        self.batch_size, self.lanes, self.seed, self.shares = batch_size, lanes, seed, tuple(shares)
        self.sources: list[Lanes] = []
        for number, (sizes, share) in enumerate(zip(shard_sizes, shares, strict=True)):
            # By share: a source's window lasts as long as that of one source alone, and as many shards are in use.
            window = max(1, round(window_shards * share / sum(shares)))
            try:
                self.sources.append(
                    Lanes(
                        sizes, seed=seed, lanes=lanes, window_shards=window, resampled=resampled, turned=True,
                        source=number,
                    )
                )  # fmt: skip
            except ValueError as error:
                raise ValueError(f"--data, source {number + 1} of {len(shares)}: its {error}") from None
        self.num_samples = sum(source.num_samples for source in self.sources)
        self.left_out = sum(source.left_out for source in self.sources)
        """Samples of each source's epochs that equal lanes cannot hold, summed."""
        self._first_shards = np.cumsum([0, *(len(source.shard_sizes) for source in self.sources)]).tolist()
        self._splits = _splits(shares, lanes)

    def slots(self, step: int, rank: int = 0, world_size: int = 1) -> Slots:
        """Returns the slots of global batch `step` (0-based) that `rank` owns, lane by lane.

        Concatenated over ranks they are the slots of world size 1. Raises ValueError if ranks cannot share the lanes.
        """
        lanes = lanes_of_rank(self.lanes, rank, world_size)
        per_lane = self.batch_size // self.lanes
        counts = self.counts(np.arange(step * per_lane, (step + 1) * per_lane + 1), lanes)
        columns = np.empty((3, len(lanes), per_lane), np.int64)
        for source, first_shard, count in zip(self.sources, self._first_shards, counts, strict=False):
            here = count[:, 1:] > count[:, :-1]
            slots = source.places(lanes, count[:, 0].tolist(), (count[:, -1] - count[:, 0]).tolist())
            columns[0, here], columns[1, here], columns[2, here] = slots.epoch, slots.shard + first_shard, slots.ordinal
        return Slots(*columns.reshape(3, -1))

    def counts(self, slots: IntArray, lanes: range) -> IntArray:
        """Returns how many of the first n slots of each lane belong to each source.

        slots: int64 [n], each below 2**47. Returns int64 [sources, lanes, n].
        """
        counts = np.empty((len(self.sources), len(lanes), len(slots)), np.int64)
        counts[self._splits[0].members[0]] = slots
        for split in self._splits:
            left, right = split.members
            both = counts[left]
            counts[right] = both - _scaled(both, split.share, split.phases[lanes.start : lanes.stop, None])
            counts[left] = both - counts[right]
        return counts

    def samples_by_source(self, steps: int) -> list[int]:
        """Returns how many slots of the first `steps` global batches belong to each source."""
        slots = np.array([steps * (self.batch_size // self.lanes)])
        return self.counts(slots, range(self.lanes)).sum(axis=(1, 2)).tolist()


@dataclass(frozen=True)
class _Split:
    """Slots of some sources, cut in two."""

    members: tuple[int, int]
    """A source of either part. It stands for its part until that is split in turn; the left one stood for both."""
    share: int
    """Of the left part in both, times 2**32."""
    phases: IntArray
    """[lanes], times 2**32, in (0, 1)."""


def _splits(shares: Sequence[float], lanes: int) -> list[_Split]:
    """The tree of splits, root first.

    Huffman's: a part of several sources is at most two thirds of what it is cut from, which keeps a lane less than 4
    samples off in any source however many there are (less than 2 of three sources, less than 1 of two).
    """
    # Sources with equal shares are told apart by number, so that the tree does not depend on the heap.
    parts = [(share, number) for number, share in enumerate(shares)]
    heapq.heapify(parts)
    cuts: list[tuple[tuple[int, int], int]] = []
    while len(parts) > 1:
        (light, right), (heavy, left) = heapq.heappop(parts), heapq.heappop(parts)
        cuts.append(((left, right), round(heavy / (light + heavy) * 2**_BITS)))
        heapq.heappush(parts, (light + heavy, left))
    depth = [0] * len(shares)
    splits: list[_Split] = []
    for (left, right), share in reversed(cuts):
        splits.append(_Split((left, right), share, _phases(lanes, depth[left])))
        depth[left] = depth[right] = depth[left] + 1
    return splits


def _phases(lanes: int, depth: int) -> IntArray:
    """Evenly spaced numbers, one a lane, times 2**32: neighbours, which one rank owns, far from each other.

    A Korobov lattice by the golden ratio: the phases of a split and of those below it fill the square evenly, so that
    shares stay even over the lanes in a tree too.
    """
    step = lanes * _GOLDEN >> _BITS
    while math.gcd(step, lanes) > 1:
        step += 1
    return (np.arange(lanes) * pow(step, depth + 1, lanes) % lanes * 2 + 1) * 2**_BITS // (2 * lanes)


def _scaled(numbers: IntArray, share: int, phase: IntArray) -> IntArray:
    """Returns floor(numbers * share + phase), share and phase times 2**32, in two steps that stay within 63 bits."""
    half = _BITS // 2
    high, low = numbers >> half, numbers & (2**half - 1)
    return (high * share + ((low * share + phase) >> half)) >> half
