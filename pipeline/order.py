"""The order of samples: pure, (seed, epoch) -> which sample stands in which slot of which global batch.

An epoch's shards stand in random order and the run of their samples is cut into equal lanes. Inside a lane, samples
are shuffled over a window of a few shards. A global batch takes equally from each lane, and a rank owns whole lanes:
any world size that divides the lanes sees the same global batches, and each lane reads a few shards at a time.
A lane goes through epoch after epoch without a gap, so no sample is left over at an epoch's end but the
`num_samples % lanes` that equal lanes cannot hold (other ones in each epoch).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]

# What a Generator is for, as a word of its Philox counter: the two uses never share a number.
_SHARDS, _WINDOW = 0, 1


@dataclass(frozen=True)
class Slots:
    """Where the samples of consecutive batch slots stand. Each: int64 [slots]."""

    epoch: IntArray
    shard: IntArray
    ordinal: IntArray
    """Which of the shard's usable samples, in index order."""


def default_lanes(batch_size: int) -> int:
    """Returns the largest power of two up to 64 that divides the global batch, so that 1 to 64 ranks may share it."""
    return math.gcd(batch_size, 64)


class Order:
    """The order of a shard set. Stateless but for a cache: any step may be asked for, in any sequence, by any thread.

    Every usable sample appears exactly once an epoch, apart from the remainder above.
    """

    def __init__(
        self, shard_sizes: npt.ArrayLike, *, batch_size: int, seed: int, lanes: int, window_shards: int = 4
    ) -> None:
        """shard_sizes: usable samples of each shard. batch_size: global. Raises ValueError where they do not fit."""
        self.shard_sizes = np.asarray(shard_sizes, np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        self.batch_size, self.lanes, self.seed, self.window_shards = batch_size, lanes, seed, window_shards
        if batch_size < 1 or lanes < 1:
            raise ValueError(f"--batch-size {batch_size} in {lanes} lanes trains on nothing; give at least 1 of each")
        if batch_size % lanes:
            raise ValueError(f"--batch-size {batch_size} is not a multiple of the {lanes} lanes; change one of them")
        if batch_size > self.num_samples:
            raise ValueError(
                f"--batch-size {batch_size} exceeds the {self.num_samples} usable samples of the data; "
                "lower it or add data"
            )
        self.lane_length = self.num_samples // lanes
        self.left_out = self.num_samples % lanes
        """Samples of each epoch that equal lanes cannot hold."""
        self._run = functools.lru_cache(maxsize=2)(self._run_of)
        self._window = functools.lru_cache(maxsize=4 * lanes)(self._window_of)

    def slots(self, step: int, rank: int = 0, world_size: int = 1) -> Slots:
        """Returns the slots of global batch `step` (0-based) that `rank` owns, lane by lane.

        Concatenated over ranks they are the slots of world size 1. Raises ValueError if ranks cannot share the lanes.
        """
        if self.lanes % world_size:
            raise ValueError(f"world size {world_size} does not divide the {self.lanes} lanes; use a divisor of them")
        per_lane = self.batch_size // self.lanes
        own = self.lanes // world_size
        place = np.arange(step * per_lane, (step + 1) * per_lane)
        lanes = range(rank * own, (rank + 1) * own)
        parts = [self._lane_slots(lane, place // self.lane_length, place % self.lane_length) for lane in lanes]
        return Slots(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _lane_slots(self, lane: int, epoch: IntArray, place: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The (epoch, shard, ordinal) at consecutive places of a lane. place: int64 [n], 0 <= place < lane_length."""
        shard, ordinal = np.empty_like(place), np.empty_like(place)
        done = 0
        while done < len(place):
            start, shards, ordinals = self._window_at(int(epoch[done]), lane, int(place[done]))
            # Windows end where the lane does, so what is left of this one is all of one epoch.
            first = int(place[done]) - start
            count = min(len(place) - done, len(shards) - first)
            shard[done : done + count] = shards[first : first + count]
            ordinal[done : done + count] = ordinals[first : first + count]
            done += count
        return epoch, shard, ordinal

    def _window_at(self, epoch: int, lane: int, place: int) -> tuple[int, IntArray, IntArray]:
        """The shuffled window that holds a lane's place: (its first place, shards, ordinals)."""
        _, starts = self._run(epoch)
        begin = lane * self.lane_length
        first = int(np.searchsorted(starts, begin, "right")) - 1
        here = int(np.searchsorted(starts, begin + place, "right")) - 1
        return self._window(epoch, lane, first + (here - first) // self.window_shards * self.window_shards)

    def _run_of(self, epoch: int) -> tuple[IntArray, IntArray]:
        """(shards in this epoch's order, the run position at which each begins, and the run's end)."""
        order = self._generator(_SHARDS, epoch, 0).permutation(np.flatnonzero(self.shard_sizes))
        return order, np.concatenate([[0], np.cumsum(self.shard_sizes[order])])

    def _window_of(self, epoch: int, lane: int, first_shard: int) -> tuple[int, IntArray, IntArray]:
        order, starts = self._run(epoch)
        lane_begin = lane * self.lane_length
        last_shard = min(first_shard + self.window_shards, len(order))
        begin = max(lane_begin, int(starts[first_shard]))
        end = min(lane_begin + self.lane_length, int(starts[last_shard]))
        run = begin + self._generator(_WINDOW, epoch, begin).permutation(end - begin)
        at = np.searchsorted(starts, run, "right") - 1
        return begin - lane_begin, order[at], run - starts[at]

    def _generator(self, use: int, epoch: int, place: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=self.seed, counter=[0, use, epoch, place]))
