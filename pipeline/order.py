"""The order of samples: pure, (seed, epoch) -> which sample stands in which slot of which global batch.

An epoch's shards stand in random order and the run of their samples is cut into equal lanes. Inside a lane, samples
are shuffled over a window of a few shards. A global batch takes equally from each lane, and a rank owns whole lanes:
any world size that divides the lanes sees the same global batches, and each lane reads a few shards at a time.
A lane goes through epoch after epoch without a gap, so no sample is left over at an epoch's end but the
`num_samples % lanes` that equal lanes cannot hold.

An epoch is exhaustive (every shard once) or resampled (shards drawn with replacement, as much in all).
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# What a Generator is for, as a word of its Philox counter: no two uses share a number.
_SHARDS, _WINDOW, _DRAWS, _TURN = 0, 1, 2, 3

REPEAT = 2**20
"""What each repeat of a shard within a resampled epoch adds to Slots.epoch."""


@dataclass(frozen=True)
class Slots:
    """Where the samples of consecutive batch slots stand. Each: int64 [slots]."""

    epoch: IntArray
    """Of the sample's source. A shard that a resampled epoch holds again counts as REPEAT epochs later each time, so
    that crops and captions, which are drawn by epoch, differ there too."""
    shard: IntArray
    ordinal: IntArray
    """Which of the shard's usable samples, in index order."""


class BatchOrder(Protocol):
    """What a loader asks of an order, of one source or of a mixture."""

    batch_size: int

    def slots(self, step: int, rank: int = 0, world_size: int = 1) -> Slots:
        """Returns the slots of global batch `step` that `rank` owns."""
        ...


def default_lanes(batch_size: int) -> int:
    """Returns the largest power of two up to 64 that divides the global batch, so that 1 to 64 ranks may share it."""
    return math.gcd(batch_size, 64)


def check_batch(batch_size: int, lanes: int) -> None:
    """Raises ValueError where a global batch cannot take equally from each lane."""
    if batch_size < 1 or lanes < 1:
        raise ValueError(f"--batch-size {batch_size} in {lanes} lanes trains on nothing; give at least 1 of each")
    if batch_size % lanes:
        raise ValueError(f"--batch-size {batch_size} is not a multiple of the {lanes} lanes; change one of them")


def lanes_of_rank(lanes: int, rank: int, world_size: int) -> range:
    """Returns the lanes that a rank owns. Raises ValueError if ranks cannot share them evenly."""
    if lanes % world_size:
        raise ValueError(f"world size {world_size} does not divide the {lanes} lanes; use a divisor of them")
    own = lanes // world_size
    return range(rank * own, (rank + 1) * own)


class Lanes:
    """One source's lanes: which sample stands at which place of a lane, counted over all epochs.

    Stateless but for caches: any place may be asked for, in any sequence, by any thread.
    """

    def __init__(
        self,
        shard_sizes: npt.ArrayLike,
        *,
        seed: int,
        lanes: int,
        window_shards: int,
        resampled: bool = False,
        turned: bool = False,
        source: int = 0,
    ) -> None:
        """shard_sizes: usable samples of each shard. source: its number; each has random numbers of its own.

        turned: shards begin at another sample in each epoch. Without, what the run leaves out at its end is always a
        shard's last samples: few in a large set, always the same in a set of one shard.
        Raises ValueError where a lane would be empty.
        """
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.seed, self.lanes, self.window_shards = seed, lanes, window_shards
        self.resampled, self.turned, self._source = resampled, turned, source
        if self.num_samples < lanes:
            raise ValueError(
                f"{self.num_samples} usable samples are fewer than the {lanes} lanes; lower --lanes or add data"
            )
        self.lane_length = self.num_samples // lanes
        self.left_out = self.num_samples % lanes
        """Samples of each epoch that equal lanes cannot hold."""
        # A small source may go through several epochs within a batch.
        self._run = functools.lru_cache(maxsize=16)(self._run_of)
        # A lane is in one window, or passing from one to the next.
        self._window = functools.lru_cache(maxsize=2 * lanes)(self._window_of)

    def places(self, lanes: Sequence[int], first: Sequence[int], count: Sequence[int]) -> Slots:
        """Returns, lane by lane, the samples at places [first, first + count) of each, counted over all epochs."""
        size = sum(count)
        epochs, shards, ordinals = np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64)
        done = 0
        for lane, place, length in zip(lanes, first, count, strict=True):
            end = done + length
            while done < end:
                # Windows end where the lane does, so each is all of one epoch.
                window = self._window_at(*divmod(place, self.lane_length), lane)
                begin = place % self.lane_length - window.start
                some = min(end - done, len(window.ordinals) - begin)
                epochs[done : done + some] = window.epochs[begin : begin + some]
                shards[done : done + some] = window.shards[begin : begin + some]
                ordinals[done : done + some] = window.ordinals[begin : begin + some]
                done += some
                place += some
        return Slots(epochs, shards, ordinals)

    def _window_at(self, epoch: int, place: int, lane: int) -> "_Window":
        """The shuffled window that holds a lane's place in an epoch."""
        starts = self._run(epoch).starts
        begin = lane * self.lane_length
        first = int(starts.searchsorted(begin, "right")) - 1
        here = int(starts.searchsorted(begin + place, "right")) - 1
        return self._window(epoch, lane, first + (here - first) // self.window_shards * self.window_shards)

    def _run_of(self, epoch: int) -> "_Run":
        full = np.flatnonzero(self.shard_sizes)
        turn = int(self._generator(_TURN, epoch, 0).integers(2**32)) if self.turned else 0
        if not self.resampled:
            shards = self._generator(_SHARDS, epoch, 0).permutation(full)
            epochs = np.broadcast_to(np.int64(epoch), shards.shape)
        else:
            shards = self._drawn(full, epoch)
            epochs = epoch + REPEAT * _repeats(shards)
        return _Run(shards, epochs, np.concatenate([[0], np.cumsum(self.shard_sizes[shards])]), turn)

    def _drawn(self, full: IntArray, epoch: int) -> IntArray:
        """Shards drawn with replacement until they hold a sample for each place of the lanes."""
        generator, shards, wanted = self._generator(_DRAWS, epoch, 0), full[:0], self.lanes * self.lane_length
        while self.shard_sizes[shards].sum() < wanted:
            shards = np.concatenate([shards, generator.choice(full, len(full))])
        return shards[: np.searchsorted(np.cumsum(self.shard_sizes[shards]), wanted) + 1]

    def _window_of(self, epoch: int, lane: int, first_shard: int) -> "_Window":
        run = self._run(epoch)
        starts, lane_begin = run.starts, lane * self.lane_length
        last_shard = min(first_shard + self.window_shards, len(run.shards))
        begin = max(lane_begin, int(starts[first_shard]))
        end = min(lane_begin + self.lane_length, int(starts[last_shard]))
        places = begin + self._generator(_WINDOW, epoch, begin).permutation(end - begin)
        at = starts.searchsorted(places, "right") - 1
        shards, ordinals = run.shards[at], places - starts[at]
        if run.turn:
            ordinals = (ordinals + run.turn) % self.shard_sizes[shards]
        # A few hundred windows are kept, each of tens of thousands of samples.
        epochs = run.epochs[at].astype(np.int32) if self.resampled else np.broadcast_to(np.int64(epoch), at.shape)
        return _Window(begin - lane_begin, epochs, shards.astype(np.int32), ordinals.astype(np.int32))

    def _generator(self, use: int, epoch: int, place: int) -> np.random.Generator:
        key = self.seed + (self._source << 64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, use, epoch, place]))


class Order(Lanes):
    """The batches of a shard set. Any step may be asked for, in any sequence, by any thread.

    Every usable sample appears exactly once an exhaustive epoch, apart from the remainder above.
    """

    def __init__(
        self,
        shard_sizes: npt.ArrayLike,
        *,
        batch_size: int,
        seed: int,
        lanes: int,
        window_shards: int = 4,
        resampled: bool = False,
    ) -> None:
        """shard_sizes: usable samples of each shard. batch_size: global. Raises ValueError where they do not fit."""
        check_batch(batch_size, lanes)
        self.batch_size = batch_size
        num_samples = int(np.sum(shard_sizes))
        if batch_size > num_samples:
            raise ValueError(
                f"--batch-size {batch_size} exceeds the {num_samples} usable samples of the data; lower it or add data"
            )
        super().__init__(
            shard_sizes, seed=seed, lanes=lanes, window_shards=window_shards, resampled=resampled, turned=resampled
        )

    def slots(self, step: int, rank: int = 0, world_size: int = 1) -> Slots:
        """Returns the slots of global batch `step` (0-based) that `rank` owns, lane by lane.

        Concatenated over ranks they are the slots of world size 1. Raises ValueError if ranks cannot share the lanes.
        """
        lanes = lanes_of_rank(self.lanes, rank, world_size)
        per_lane = self.batch_size // self.lanes
        return self.places(lanes, [step * per_lane] * len(lanes), [per_lane] * len(lanes))


@dataclass(frozen=True)
class _Run:
    """An epoch's run of samples, before it is cut into lanes."""

    shards: IntArray
    epochs: IntArray
    """Slots.epoch of each shard."""
    starts: IntArray
    """The position in the run at which each shard begins, and the run's end."""
    turn: int
    """At which sample, modulo its size, each shard begins."""


@dataclass(frozen=True)
class _Window:
    """A stretch of a lane, shuffled: the columns of Slots, as any integers."""

    start: int
    """Its first place in the lane."""
    epochs: npt.NDArray[np.integer]
    shards: npt.NDArray[np.int32]
    ordinals: npt.NDArray[np.int32]


def _repeats(values: IntArray) -> IntArray:
    """Returns how often each value has stood before."""
    by_value = np.argsort(values, kind="stable")
    ordered = values[by_value]
    repeats = np.empty_like(values)
    repeats[by_value] = np.arange(len(values)) - np.searchsorted(ordered, ordered)
    return repeats
