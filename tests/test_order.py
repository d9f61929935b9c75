import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import REPEAT, Order, default_lanes

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) >= 16)


def pairs(order: Order, steps: range, rank: int = 0, world_size: int = 1) -> list[tuple[int, int, int]]:
    slots = [order.slots(step, rank, world_size) for step in steps]
    return [
        (int(e), int(s), int(o)) for part in slots for e, s, o in zip(part.epoch, part.shard, part.ordinal, strict=True)
    ]


@settings(max_examples=60)
@given(sizes, st.integers(0, 2**31), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
def test_every_sample_once_an_epoch(sizes: list[int], seed: int, lanes: int, window_shards: int) -> None:
    order = Order(sizes, batch_size=lanes, seed=seed, lanes=lanes, window_shards=window_shards)
    for epoch in range(2):
        steps = range(epoch * order.lane_length, (epoch + 1) * order.lane_length)
        seen = pairs(order, steps)
        assert {e for e, _, _ in seen} == {epoch}
        assert len(set(seen)) == len(seen) == sum(sizes) - order.left_out
        assert all(0 <= ordinal < sizes[shard] for _, shard, ordinal in seen)


@settings(max_examples=40)
@given(sizes, st.integers(0, 2**31), st.sampled_from([1, 2, 4, 8]))
def test_ranks_are_disjoint_and_together_the_whole_batch(sizes: list[int], seed: int, world_size: int) -> None:
    order = Order(sizes, batch_size=16, seed=seed, lanes=8)
    for step in (0, 3, 11):
        whole = pairs(order, range(step, step + 1))
        ranks = [pairs(order, range(step, step + 1), rank, world_size) for rank in range(world_size)]
        assert [pair for rank in ranks for pair in rank] == whole


def test_order_is_stateless_and_differs_by_seed_and_epoch() -> None:
    def make(seed: int = 1) -> Order:
        return Order([50, 30, 20, 60], batch_size=8, seed=seed, lanes=4)

    forward = [pairs(make(), range(step, step + 1)) for step in range(60)]
    order = make()
    assert [pairs(order, range(step, step + 1)) for step in reversed(range(60))] == forward[::-1]
    assert pairs(make(2), range(5)) != pairs(make(1), range(5))
    epochs = [[(s, o) for _, s, o in pairs(order, range(e * 20, (e + 1) * 20))] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1])
    assert epochs[0] != epochs[1]


def test_a_lane_reads_few_shards_at_a_time() -> None:
    order = Order([100] * 64, batch_size=16, seed=0, lanes=4, window_shards=2)
    for first in range(0, 400, 50):
        shards = {s for _, s, _ in pairs(order, range(first, first + 25), rank=0, world_size=4)}
        assert len(shards) <= 4  # two windows of two shards at most


def test_shuffling_mixes_shards_within_the_window() -> None:
    order = Order([500] * 8, batch_size=50, seed=0, lanes=1, window_shards=8)
    counts = np.bincount([s for _, s, _ in pairs(order, range(4))], minlength=8)
    assert counts.min() >= 10  # 200 of 4,000 drawn evenly: 25 each, standard deviation 4.7


def test_the_order_is_that_of_older_runs() -> None:
    order = Order([50, 0, 31, 20, 67, 9], batch_size=16, seed=2**40 + 7, lanes=8, window_shards=2)
    digest = hashlib.sha256()
    for slots in map(order.slots, range(40)):
        digest.update(np.stack([slots.epoch, slots.shard, slots.ordinal]).astype("<i8").tobytes())
    assert digest.hexdigest() == "038f43a3d2bd41e8cb24d3c0a32bae53ec06da57c2d09e09c8864066edb167c7"


@settings(max_examples=40)
@given(sizes, st.integers(0, 2**31), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
def test_a_resampled_epoch_is_whole_shards_drawn_again_and_again(
    sizes: list[int], seed: int, lanes: int, window_shards: int
) -> None:
    order = Order(sizes, batch_size=lanes, seed=seed, lanes=lanes, window_shards=window_shards, resampled=True)
    for epoch in range(2):
        seen = pairs(order, range(epoch * order.lane_length, (epoch + 1) * order.lane_length))
        assert len(seen) == lanes * order.lane_length
        # A repeat counts as a later epoch, so that no sample is shown twice in the same way.
        assert len(set(seen)) == len(seen)
        assert {e % REPEAT for e, _, _ in seen} == {epoch}
        held = Counter((shard, e // REPEAT) for e, shard, _ in seen)
        draws = Counter(shard for shard, _ in held)
        for (shard, repeat), count in held.items():
            assert repeat < draws[shard]
            assert count <= sizes[shard]
        assert sum(count < sizes[shard] for (shard, _), count in held.items()) <= 1  # where the run was cut
        assert all(0 <= ordinal < sizes[shard] for _, shard, ordinal in seen)


def test_resampled_epochs_differ_and_are_stateless() -> None:
    def make() -> Order:
        return Order([50, 30, 20, 60], batch_size=8, seed=1, lanes=4, resampled=True)

    forward = [pairs(make(), range(step, step + 1)) for step in range(60)]
    order = make()
    assert [pairs(order, range(step, step + 1)) for step in reversed(range(60))] == forward[::-1]
    ranks = [pairs(order, range(7, 8), rank, 4) for rank in range(4)]
    assert [pair for rank in ranks for pair in rank] == forward[7]
    epochs = [Counter((s, o) for step in forward[e * 20 : (e + 1) * 20] for _, s, o in step) for e in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]


def test_resampled_draws_are_even_over_shards_and_samples() -> None:
    order = Order([7] * 30, batch_size=15, seed=5, lanes=15, resampled=True)
    slots = order.places(range(15), [0] * 15, [400 * order.lane_length] * 15)
    counts = Counter(zip(slots.shard.tolist(), slots.ordinal.tolist(), strict=True))
    # 400 epochs: each sample 400 times by a Poisson law (standard deviation 20), the shards likewise.
    assert len(counts) == 210
    shown = np.array([[counts[shard, ordinal] for ordinal in range(7)] for shard in range(30)])
    assert shown.sum() == 400 * 210
    assert abs(shown.mean(axis=1) - 400).max() < 80
    assert shown.mean(axis=1).std() > 8  # drawn, not dealt
    # The cut at an epoch's end falls on no ordinal more than on another.
    assert abs(shown.mean(axis=0) - 400).max() < 8


def test_one_small_shard_resampled_shows_every_sample() -> None:
    order = Order([100], batch_size=64, seed=0, lanes=64, resampled=True)
    assert order.left_out == 36
    assert {o for _, _, o in pairs(order, range(30))} == set(range(100))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="--batch-size 64 exceeds the 50 usable samples"):
        Order([50], batch_size=64, seed=0, lanes=1)
    with pytest.raises(ValueError, match="--batch-size 0 in 64 lanes trains on nothing"):
        Order([50], batch_size=0, seed=0, lanes=default_lanes(0))
    with pytest.raises(ValueError, match="not a multiple of the 4 lanes"):
        Order([50], batch_size=10, seed=0, lanes=4)
    with pytest.raises(ValueError, match="world size 3 does not divide the 4 lanes"):
        Order([50], batch_size=8, seed=0, lanes=4).slots(0, 0, 3)
    assert [default_lanes(size) for size in (1, 96, 256, 32768)] == [1, 32, 64, 64]
