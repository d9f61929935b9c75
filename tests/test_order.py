import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.order import Order, default_lanes

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) >= 16)


def pairs(order: Order, steps: range, rank: int = 0, world_size: int = 1) -> list[tuple[int, int, int]]:
    slots = [order.slots(step, rank, world_size) for step in steps]
    return [
        (int(e), int(s), int(o)) for part in slots for e, s, o in zip(part.epoch, part.shard, part.ordinal, strict=True)
    ]


@settings(deadline=None, max_examples=60)
@given(sizes, st.integers(0, 2**31), st.sampled_from([1, 2, 4, 8]), st.integers(1, 5))
def test_every_sample_once_an_epoch(sizes: list[int], seed: int, lanes: int, window_shards: int) -> None:
    order = Order(sizes, batch_size=lanes, seed=seed, lanes=lanes, window_shards=window_shards)
    for epoch in range(2):
        steps = range(epoch * order.lane_length, (epoch + 1) * order.lane_length)
        seen = pairs(order, steps)
        assert {e for e, _, _ in seen} == {epoch}
        assert len(set(seen)) == len(seen) == sum(sizes) - order.left_out
        assert all(0 <= ordinal < sizes[shard] for _, shard, ordinal in seen)


@settings(deadline=None, max_examples=40)
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
