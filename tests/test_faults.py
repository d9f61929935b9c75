"""Runs on several ranks that something happens to: killed, stopped, told to end, numbers that are none."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torchrun
from conftest import ledger
from safetensors.torch import load_file

import train
from training import checkpoint
from training.metrics import read_jsonl

FAULTY = str(torchrun.ROOT / "tests" / "faulty_train.py")
SMALL = ("--model", "ViT-Ti-16", "--tokens", "4", "--text-tokens", "6", "--batch-size", "32", "--warmup-samples", "16",
         "--device", "cpu", "--log-every", "1", "--checkpoint-every", "2")  # fmt: skip


STEPS = 30
"""Of a run that is to be stopped on its way: what stops it may come late on a loaded machine."""


def arguments(data: Path, out: Path, steps: int, *more: str) -> tuple[str, ...]:
    return ("--data", str(data), "--out", str(out), "--steps", str(steps), *SMALL, *more)


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest, passed_over = checkpoint.newest(run)
    assert newest is not None
    assert passed_over == []
    return {**newest.model_tensors(), **newest.optimizer_tensors()}


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]


def newest_step(run: Path) -> int:
    return max((checkpoint.step_of(path) for path in checkpoint.list_steps(run)), default=0)


def has_step(run: Path, step: int) -> bool:
    return newest_step(run) >= step


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    torchrun.kill_left_over()


@pytest.fixture(scope="module")
def uninterrupted(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    output = torchrun.run(2, "train.py", *arguments(shards, run, STEPS))
    assert output.count(f"step {STEPS}/{STEPS} ") == 1, "rank 0 alone is to print"
    return run


def test_two_ranks_do_what_one_process_does(uninterrupted: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main([*arguments(shards, run, STEPS)]) == 0
    assert ledger(run) == ledger(uninterrupted)
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-5)


def test_kill_9_and_the_same_command_equals_no_interruption(uninterrupted: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun.start(2, "train.py", *arguments(shards, run, STEPS))
    torchrun.wait_for(lambda: has_step(run, 2), process)
    torchrun.kill_all(process)
    # Then one rank alone dies: the other says so and ends, and torchrun starts both again, without a hand.
    begin = newest_step(run)
    process = torchrun.start(2, "train.py", *arguments(shards, run, STEPS), torchrun=("--max-restarts", "1"))
    torchrun.wait_for(lambda: has_step(run, begin + 2), process)
    pid = torchrun.rank_pid(process, 1)
    os.kill(pid, signal.SIGKILL)
    output = torchrun.end(process)
    assert process.returncode == 0, output
    assert re.search(rf"error: lost rank 1: its process {pid} died \(step \d+, [a-z ]+\); the same command", output), (
        output
    )
    assert same_bits(weights(run), weights(uninterrupted))
    assert ledger(run) == ledger(uninterrupted)


def test_a_loss_and_a_gradient_that_are_no_numbers_are_left_out_by_all(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun.run(2, FAULTY, "loss:3,4", "1", str(tmp_path), *arguments(shards, run, 6, "--ema", "0.5"))
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows] == [0, 0, 1, 2, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, False, True, True, False, False]
    counted = [json.loads((tmp_path / f"counted.{rank}.json").read_text()) for rank in (0, 1)]
    assert counted[0] == counted[1] == [[0, 0], [0, 0], [1, 1], [2, 2], [2, 0], [2, 0]]
    first, second = (load_file(tmp_path / f"weights.{rank}.safetensors") for rank in (0, 1))
    assert same_bits(first, second)
    newest = checkpoint.newest(run)[0]
    assert newest is not None
    assert newest.state["skipped_steps"] == 2
    # Step 4 would have been saved; a checkpoint of a step that went wrong pushes no good one out.
    assert [path.name for path in checkpoint.list_steps(run)] == ["step-00000002", "step-00000006"]
    assert all(bool(each.isfinite().all()) for group in ("model", "optimizer", "ema")
               for each in newest.tensors(group).values())  # fmt: skip
    assert {float(value) for name, value in newest.optimizer_tensors().items() if name.endswith(".step")} == {4.0}


@pytest.mark.slow
def test_with_sharded_weights_too_an_infinite_gradient_is_left_out_by_all(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    torchrun.run(2, FAULTY, "gradient:3", "1", str(tmp_path), *arguments(shards, run, 4, "--shard"))
    assert [row["skipped_steps"] for row in read_jsonl(run / "metrics.jsonl")] == [0, 0, 1, 1]
    assert all(bool(each.isfinite().all()) for each in weights(run).values())


@pytest.mark.slow
def test_kill_9_at_random_moments(shards: Path, tmp_path: Path) -> None:
    """20 kills of all processes, of which some fall into a save: one is written every other step."""
    # Each of the 20 starts does some steps, more on a faster machine.
    steps, whole, run = 600, tmp_path / "whole", tmp_path / "run"
    torchrun.run(2, "train.py", *arguments(shards, whole, steps))
    draw = random.Random(0)
    num_kills = during_save = 0
    while num_kills < 20:
        process = torchrun.start(2, "train.py", *arguments(shards, run, steps))
        begin = newest_step(run)
        folder = run / checkpoint.FOLDER
        left_over = frozenset(folder.glob(f"*{checkpoint.PARTIAL}"))

        def saving(folder: Path = folder, left_over: frozenset[Path] = left_over) -> bool:
            return bool(set(folder.glob(f"*{checkpoint.PARTIAL}")) - left_over)

        if draw.random() < 0.5:
            torchrun.wait_for(saving, process)
        else:
            torchrun.wait_for(lambda begin=begin: has_step(run, begin + 2), process)
            time.sleep(draw.uniform(0, 0.5))
        if process.poll() is not None:
            break
        during_save += saving()
        torchrun.kill_all(process)
        num_kills += 1
    torchrun.run(2, "train.py", *arguments(shards, run, steps))
    print(f"{num_kills} kills, {during_save} of them during a save")
    assert num_kills == 20
    assert during_save >= 3
    assert same_bits(weights(run), weights(whole))
    assert ledger(run) == ledger(whole)
    assert not any((run / checkpoint.FOLDER).glob(f"*{checkpoint.PARTIAL}"))


@pytest.mark.slow
def test_two_ranks_four_and_two_again_see_the_same_batches(shards: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    torchrun.run(2, "train.py", *arguments(shards, whole, 9))
    # The rate at a step depends on the run's length, so a part of a run is one that was interrupted.
    for world_size, step in ((2, 2), (4, 6)):
        process = torchrun.start(world_size, "train.py", *arguments(shards, run, 9))
        torchrun.wait_for(lambda step=step: has_step(run, step), process)
        torchrun.kill_all(process)
    torchrun.run(2, "train.py", *arguments(shards, run, 9))
    assert ledger(run) == ledger(whole)
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("way", [("--shard",), ("--shard", "--accumulate", "2"), ("--ema", "0.9", "--grad-clip", "1")])
def test_every_layout_resumes_bit_by_bit(way: tuple[str, ...], shards: Path, tmp_path: Path) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    torchrun.run(2, "train.py", *arguments(shards, whole, 6, *way))
    process = torchrun.start(2, "train.py", *arguments(shards, run, 6, *way))
    torchrun.wait_for(lambda: has_step(run, 2), process)
    torchrun.kill_all(process)
    torchrun.run(2, "train.py", *arguments(shards, run, 6, *way))
    assert same_bits(weights(run), weights(whole))
    assert ledger(run) == ledger(whole)
    ends = [checkpoint.newest(each)[0] for each in (run, whole)]
    assert all(end is not None for end in ends)
    assert same_bits(*(end.tensors("ema") for end in ends if end is not None))


@pytest.mark.slow
def test_four_ranks_resume_bit_by_bit(shards: Path, tmp_path: Path) -> None:
    """Where more than two add up a number, the order in which they do shows."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    torchrun.run(4, "train.py", *arguments(shards, whole, 6))
    process = torchrun.start(4, "train.py", *arguments(shards, run, 6))
    torchrun.wait_for(lambda: has_step(run, 2), process)
    torchrun.kill_all(process)
    torchrun.run(4, "train.py", *arguments(shards, run, 6))
    assert same_bits(weights(run), weights(whole))


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on(uninterrupted: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--checkpoint-every", "100")
    process = torchrun.start(2, "train.py", *arguments(shards, run, STEPS, *more))
    torchrun.wait_for(lambda: len(read_jsonl(run / "metrics.jsonl")) >= 2, process)
    process.send_signal(signal.SIGTERM)
    output = torchrun.end(process)
    assert process.returncode != 0
    assert "the same command goes on from checkpoint" in output
    assert "lost rank" not in output
    torchrun.run(2, "train.py", *arguments(shards, run, STEPS))
    assert same_bits(weights(run), weights(uninterrupted))


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_after_the_same_step(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = torchrun.start(2, "train.py", *arguments(shards, run, 500, "--checkpoint-every", "1000"))
    torchrun.wait_for(lambda: len(read_jsonl(run / "metrics.jsonl")) >= 2, process)
    os.kill(torchrun.rank_pid(process, 1), signal.SIGTERM)
    output = torchrun.end(process)
    assert process.returncode != 0
    assert f"exitcode  : {train.INTERRUPTED}" in output
    step = re.search(r"interrupted at step (\d+); the same command goes on from checkpoint", output)
    assert step is not None, output
    assert [path.name for path in checkpoint.list_steps(run)] == [f"step-{int(step[1]):08d}"]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "sign"), [(0, signal.SIGKILL), (0, signal.SIGSTOP), (1, signal.SIGSTOP)])
def test_a_rank_that_dies_or_stops_ends_the_others(
    rank: int, sign: signal.Signals, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = torchrun.start(2, "train.py", *arguments(shards, run, 2000, "--peer-timeout", "6"))
    torchrun.wait_for(lambda: len(read_jsonl(run / "metrics.jsonl")) >= 2, process)
    pid, other = torchrun.rank_pid(process, rank), torchrun.rank_pid(process, 1 - rank)
    os.kill(pid, sign)
    begin = time.monotonic()
    torchrun.wait_for(lambda: not Path(f"/proc/{other}/exe").exists(), process)
    took_s = time.monotonic() - begin
    if sign == signal.SIGSTOP:
        # torchrun gives it 30 seconds, since it takes no SIGTERM.
        os.kill(pid, signal.SIGKILL)
    output = torchrun.end(process)
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    why = f"its process {pid} died" if sign == signal.SIGKILL else "no sign of life for"
    assert len(said) == 1, output
    assert said[0].startswith(f"error: lost rank {rank}: {why}"), output
    assert str(pid) in said[0]
    # As documented, and some for a machine that does much else; a collective alone would wait for days.
    assert took_s < (5 if sign == signal.SIGKILL else 6 + 5) + 60, took_s


@pytest.mark.slow
def test_a_rank_that_lives_but_does_not_come_to_the_exchange_is_named(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    output = torchrun.end(process := torchrun.start(
        2, FAULTY, "hang:3", "1", str(tmp_path), *arguments(shards, run, 8, "--peer-timeout", "5")
    ))  # fmt: skip
    assert process.returncode != 0
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, output
    assert re.search(r"lost rank [01, ]+: nothing moved for \d+ s \(step 3, computing\)", said[0]), said


@pytest.mark.slow
@pytest.mark.parametrize("way", [(), ("--shard",), ("--shard", "--grad-checkpointing", "--accumulate", "2")])
def test_compiled_encoders_have_the_losses_of_plain_ones(
    way: tuple[str, ...], uninterrupted: Path, shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    torchrun.run(2, "train.py", *arguments(shards, run, STEPS, "--compile", *way))
    assert losses(run) == pytest.approx(losses(uninterrupted), rel=1e-4)
