import itertools
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from test_train import arguments, ledger, same_weights

import train
from pipeline.index import open_index
from pipeline.mixture import MIN_SHARE, Mixture, make_order, split_weights
from pipeline.order import REPEAT, Order
from pipeline.read import Reader
from training.metrics import read_jsonl

SIZES = ([50, 0, 30], [9, 8], [40, 20, 35, 12])

shares = st.lists(st.floats(0.001, 1), min_size=2, max_size=7)
lane_counts = st.sampled_from([1, 2, 3, 8, 48, 64])


def mixture(shares: list[float], *, batch_size: int = 16, lanes: int = 8, **more: Any) -> Mixture:
    return Mixture(SIZES[: len(shares)], shares, batch_size=batch_size, lanes=lanes, seed=3, **more)


def of_weights(shares: list[float], lanes: int) -> Mixture:
    return Mixture([[lanes]] * len(shares), shares, batch_size=lanes, lanes=lanes, seed=0)


def rows(order: Mixture, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int, int]]:
    slots = order.slots(step, rank, world_size)
    return list(zip(slots.epoch.tolist(), slots.shard.tolist(), slots.ordinal.tolist(), strict=True))


@settings(max_examples=60)
@given(shares, lane_counts, st.integers(0, 2**44), st.integers(1, 300))
def test_any_stretch_of_a_lane_holds_the_shares(shares: list[float], lanes: int, first: int, length: int) -> None:
    counts = of_weights(shares, lanes).counts(first + np.arange(length + 1), range(lanes))
    steps = np.diff(counts, axis=2)
    assert (counts.sum(axis=0) == first + np.arange(length + 1)).all()
    assert (steps.sum(axis=0) == 1).all()  # one source a slot
    assert set(np.unique(steps)) == {0, 1}
    wanted = np.array(shares)[:, None, None] / sum(shares) * np.arange(length + 1)
    off = abs(counts - counts[:, :, :1] - wanted).max()
    # Shares are kept to 2**-32: of no weight over a stretch like this.
    assert off < {2: 1, 3: 2}.get(len(shares), 4) + 1e-6


@settings(max_examples=40)
@given(shares, st.integers(0, 2**20))
def test_shares_hold_over_all_lanes_at_any_length(shares: list[float], steps: int) -> None:
    order = of_weights(shares, 64)
    wanted = np.array(shares) / sum(shares) * 64 * steps
    # Of two sources the evenly spread phases add up exactly; of more the bound is measured, with room.
    assert abs(order.samples_by_source(steps) - wanted).max() < (0.6 if len(shares) == 2 else 12)


def test_counts_are_what_the_formula_says_in_whole_numbers() -> None:
    order = of_weights([0.7, 0.3], 4)
    (split,) = order._splits
    assert split.share == round(0.7 * 2**32)
    assert sorted(split.phases.tolist()) == [2**29, 3 * 2**29, 5 * 2**29, 7 * 2**29]
    slots = [0, 1, 2, 17, 65_535, 65_536, 2**31, 2**40 + 12_345, 2**46]
    wanted = [[(slot * split.share + int(phase)) >> 32 for slot in slots] for phase in split.phases]
    assert order.counts(np.array(slots), range(4))[0].tolist() == wanted


def test_a_lane_takes_its_sources_in_turn_by_hand() -> None:
    order = Mixture([[8], [8]], [3, 1], batch_size=1, lanes=1, seed=0)
    assert [rows(order, step)[0][1] for step in range(8)] == [0, 0, 1, 0, 0, 0, 1, 0]


def test_slots_are_the_sources_own_lanes_in_sequence() -> None:
    order = mixture([0.5, 0.2, 0.3])
    taken: dict[tuple[int, int], list[tuple[int, int, int]]] = defaultdict(list)
    for step in range(40):
        for slot, (epoch, shard, ordinal) in enumerate(rows(order, step)):
            source = sum(shard >= first for first in (3, 5))
            taken[source, slot // 2].append((epoch, shard - (0, 3, 5)[source], ordinal))
    for (source, lane), got in taken.items():
        slots = order.sources[source].places([lane], [0], [len(got)])
        assert got == list(zip(slots.epoch.tolist(), slots.shard.tolist(), slots.ordinal.tolist(), strict=True))
    assert len(taken) == 3 * 8


@pytest.mark.parametrize("resampled", [False, True])
@pytest.mark.parametrize("shares", [[0.7, 0.3], [0.001, 0.6, 0.399]])
def test_any_world_size_and_any_step_alone_see_the_same_batches(shares: list[float], resampled: bool) -> None:
    order = mixture(shares, resampled=resampled)
    forward = [rows(order, step) for step in range(60)]
    for step in (59, 0, 31):
        for world_size in (1, 2, 4, 8):
            other = mixture(shares, resampled=resampled)
            ranks = [rows(other, step, rank, world_size) for rank in range(world_size)]
            assert {len(rank) for rank in ranks} == {16 // world_size}
            assert [row for rank in ranks for row in rank] == forward[step]
    assert rows(order, 2**30) == rows(mixture(shares, resampled=resampled), 2**30)
    assert len(set(itertools.chain(*forward))) == 60 * 16


@settings(max_examples=25)
@given(st.tuples(*[st.floats(0.01, 1)] * 3), st.integers(0, 2**31), st.sampled_from([1, 4, 8]))
def test_each_sample_once_in_each_epoch_of_its_source(
    shares: tuple[float, float, float], seed: int, lanes: int
) -> None:
    order = Mixture(SIZES, shares, batch_size=2 * lanes, lanes=lanes, seed=seed, window_shards=2)
    seen: dict[tuple[int, int], Counter[tuple[int, int]]] = defaultdict(Counter)
    steps = 200 // lanes
    for step in range(steps):
        for epoch, shard, ordinal in rows(order, step):
            seen[sum(shard >= first for first in (3, 5)), epoch][shard, ordinal] += 1
    for number, (source, first) in enumerate(zip(order.sources, (0, 3, 5), strict=True)):
        pace = order.counts(np.array([2 * steps]), range(lanes))[number, :, 0] // source.lane_length
        assert (number, max(pace) + 1) not in seen
        for epoch in range(max(pace) + 1):
            counts = seen[number, epoch]
            assert set(counts.values()) <= {1}
            assert all(0 <= ordinal < source.shard_sizes[shard - first] for shard, ordinal in counts)
            if epoch < min(pace):
                assert len(counts) == source.num_samples - source.left_out


def test_a_tiny_source_comes_round_and_round_and_loses_no_sample() -> None:
    order = Mixture([[1000] * 5, [100]], [0.5, 0.5], batch_size=256, lanes=64, seed=0)
    shown = Counter(ordinal for step in range(60) for _, shard, ordinal in rows(order, step) if shard == 5)
    assert order.left_out == 5000 % 64 + 36
    assert abs(shown.total() - 60 * 128) <= 1
    assert set(shown) == set(range(100))  # 36 of 100 are left out of an epoch, but never the same ones
    epochs = {epoch for epoch, shard, _ in rows(order, 59) if shard == 5}
    assert epochs <= {118, 119, 120}


def test_rare_sources_come_evenly() -> None:
    order = of_weights([0.001, 0.002, 0.997], 64)
    counts = order.counts(np.arange(1001), range(64)).sum(axis=1)
    batches = np.diff(counts, axis=1)  # of 64, one slot a lane
    assert batches[0].max() <= 2
    assert batches[1].max() <= 3
    assert abs(counts[:, -1] - np.array([64, 128, 63_808])).max() <= 3


def test_resampled_sources_repeat_within_an_epoch() -> None:
    order = mixture([0.4, 0.2, 0.4], resampled=True)
    seen = list(itertools.chain(*(rows(order, step) for step in range(100))))
    assert len(set(seen)) == len(seen)
    assert any(epoch >= REPEAT for epoch, _, _ in seen)
    assert any(epoch < REPEAT for epoch, _, _ in seen)


def test_equal_sources_have_orders_of_their_own() -> None:
    order = Mixture([[64] * 4] * 2, [0.5, 0.5], batch_size=8, lanes=8, seed=0)
    runs = [[row for step in range(32) for row in rows(order, step) if row[1] // 4 == source] for source in (0, 1)]
    assert [(shard, ordinal) for _, shard, ordinal in runs[0]] != [
        (shard - 4, ordinal) for _, shard, ordinal in runs[1]
    ]


def test_without_weights_sources_are_one_set() -> None:
    sizes = np.array([40, 20, 30, 10])
    more = {"batch_size": 8, "seed": 5, "lanes": 4}
    order = make_order(sizes, [1, 3], None, **more)
    assert isinstance(order, Order)
    one = Order(sizes, **more)
    assert all((order.slots(step).ordinal == one.slots(step).ordinal).all() for step in range(20))
    mixed = make_order(sizes, [1, 3], [0.5, 0.5], **more)
    assert isinstance(mixed, Mixture)
    assert [source.shard_sizes.tolist() for source in mixed.sources] == [[40], [20, 30, 10]]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="source 2 of 2: its 17 usable samples are fewer than the 64 lanes; lower"):
        mixture([0.5, 0.5], batch_size=64, lanes=64)
    with pytest.raises(ValueError, match="not a multiple of the 8 lanes"):
        mixture([0.5, 0.5], batch_size=12)
    with pytest.raises(ValueError, match="world size 3 does not divide the 8 lanes"):
        mixture([0.5, 0.5]).slots(0, 0, 3)


@pytest.mark.parametrize(
    ("data", "sources", "weights"),
    [
        (["a"], ["a"], None),
        (["a=3"], ["a"], None),
        (["a", "b"], ["a", "b"], None),
        (["a=7", "b=3"], ["a", "b"], [0.7, 0.3]),
        (["a=1", "a=1"], ["a", "a"], [0.5, 0.5]),
        (["a=1e308", "b=1e308"], ["a", "b"], [0.5, 0.5]),
        (["x=y=1", "s3://b/k=v?q=2=3e0"], ["x=y", "s3://b/k=v?q=2"], [0.25, 0.75]),
        (["x=y", "s3://b/part=2/"], ["x=y", "s3://b/part=2/"], None),
        (["=5", "a="], ["=5", "a="], None),
        (["https://h/" + "{0..9}" * 100], ["https://h/" + "{0..9}" * 100], None),
    ],
)
def test_weights_are_cut_off_their_sources(data: list[str], sources: list[str], weights: list[float] | None) -> None:
    assert split_weights(data) == (sources, weights)


def test_a_folder_of_that_name_wins(tmp_path: Path) -> None:
    (tmp_path / "a=2").mkdir()
    data = [f"{tmp_path}/a=2", f"{tmp_path}/b"]
    assert split_weights(data) == (data, None)
    assert split_weights([f"{tmp_path}/a=2=1", f"{tmp_path}/b=1"]) == (data, [0.5, 0.5])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["a=0.5", "b"], "--data b has no weight and others have one; give each SRC=WEIGHT, or none"),
        (["a=1_0", "b=1"], "--data a=1_0 has no weight and others have one"),
        (["a=0", "b=1"], "--data a=0: its weight is not a positive, finite number"),
        (["a=1", "b=-1"], "--data b=-1: its weight is not"),
        (["a=nan"], "--data a=nan: its weight is not"),
        (["a=1", "b=inf"], "--data b=inf: its weight is not"),
        (["a=1", "b=1e-9"], f"--data b=1e-9: a share of 1e-09 is below {MIN_SHARE:g}"),
    ],
)
def test_weights_that_cannot_be_are_refused(data: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_weights(data)


@pytest.fixture(scope="module")
def two(shards: Path, tmp_path_factory: pytest.TempPathFactory, coloured: Callable[[int], dict[str, Any]]) -> list[str]:
    """203 samples, and 60 others in 2 shards."""
    folder = tmp_path_factory.mktemp("more")
    for shard in range(2):
        numbers = range(1000 + 30 * shard, 1030 + 30 * shard)
        write_tar(folder / f"{shard:05d}.tar", [coloured(number) for number in numbers])
    return [str(shards), str(folder)]


def mixed(two: list[str], out: Path, steps: int, *more: str, weights: tuple[str, str] = ("0.7", "0.3")) -> list[str]:
    data = [f"{source}={weight}" for source, weight in zip(two, weights, strict=True)]
    return ["--data", *data, *arguments(Path("unused"), out, steps, *more)[2:]]


def test_a_mixture_trains_resumes_and_keeps_its_weights(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train.main(mixed(two, whole, 8, "--checkpoint-every", "4", "--ledger")) == 0
    out = capsys.readouterr().out
    assert f"source    {two[0]}: 203 pairs in 6 shards; 69.922% of the run by weight, 0.9 epochs, 11 pairs" in out
    assert f"source    {two[1]}: 60 pairs in 2 shards; 30.078% of the run by weight, 1.3 epochs" in out
    assert json.loads((whole / "config.json").read_text())["data"] == [f"{two[0]}=0.7", f"{two[1]}=0.3"]
    ids = np.array([row["sample_ids"] for row in read_jsonl(whole / "ledger.jsonl")])
    # 32 slots a step in 32 lanes, of which 30 % are 9.6: the second source's ids follow the first's.
    assert set((ids >= 203).sum(axis=1)) == {9, 10}
    assert (ids >= 203).sum() == 77

    # Resumed after its fourth step, from elsewhere, under weights of the same ratio.
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step-00000008")
    moved = [str(tmp_path / "moved"), two[1]]
    shutil.copytree(two[0], moved[0])
    assert train.main(mixed(moved, run, 8, "--checkpoint-every", "4", weights=("7", "3"))) == 0
    assert "resuming at step 4" in capsys.readouterr().out
    assert same_weights(run, whole)
    assert ledger(run) == ledger(whole)

    assert train.main(mixed(two, run, 9, weights=("0.6", "0.4"))) == 2
    error = capsys.readouterr().err
    assert "holds another run: --data has the weights 0.7 0.3 there and the weights 0.6 0.4 here" in error
    assert train.main(["--data", *two, *mixed(two, run, 9)[3:]]) == 2
    assert "--data has the weights 0.7 0.3 there and no weights here; use another --out" in capsys.readouterr().err
    assert train.main(mixed(two, run, 9, "--resampled")) == 2
    assert "--resampled is false there and true here" in capsys.readouterr().err


def test_a_resampled_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert train.main(arguments(shards, run, 2, "--resampled", "--ledger")) == 0
    assert "0.3 epochs, resampled in 32 lanes" in capsys.readouterr().out
    index = open_index([shards])
    order = Order(index.shard_sizes, batch_size=32, seed=0, lanes=32, resampled=True)
    for step, row in enumerate(read_jsonl(run / "ledger.jsonl")):
        assert row["sample_ids"] == Reader(index).locate(order.slots(step)).sample_ids.tolist()
    assert train.main(arguments(shards, run, 3)) == 2
    assert "--resampled is true there and false here" in capsys.readouterr().err


def test_mixed_and_bare_sources_are_one_line(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--data", two[0], f"{two[1]}=1", *arguments(Path("unused"), tmp_path / "run", 8)[2:]]
    assert train.main(command) == 2
    assert capsys.readouterr().err == (
        f"error: --data {two[0]} has no weight and others have one; give each SRC=WEIGHT, or none{os.linesep}"
    )
