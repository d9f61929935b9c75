"""train.py --profile: the run is the same, the parts are the whole step, and the trace shows what went on beside it."""

import itertools
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import SMALL, arguments, ledger, same_weights

import train
from benchmarks import compare
from model.clip import CLIP
from model.presets import model_config
from training import checkpoint
from training.accumulation import accumulated
from training.config import parse
from training.distributed import World
from training.marks import PARTS, Marks, marked
from training.metrics import read_jsonl
from training.profile import PROFILE, TRACE, TRACED_STEPS, WARM_UP_STEPS, Profile, summary, table

# More steps than are profiled: at the end of a run all batches are made already, and no trace could show any.
STEPS, TIMED = 24, 5
TINY = model_config("ViT-Ti-16")
LOADER, LOGS = ("data_wait",), ("logging", "checkpoint")


def profile_of(run: Path) -> dict[str, Any]:
    (row,) = json.loads((run / PROFILE).read_text())["rows"]
    return row


def events_of(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / TRACE).read_text())["traceEvents"] if (run / TRACE).exists() else []


def optimizer_tensors(run: Path) -> dict[str, torch.Tensor]:
    newest, _ = checkpoint.newest(run)
    assert newest is not None
    return newest.tensors("optimizer")


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "plain"
    assert train.main(arguments(shards, run, STEPS)) == 0
    return run


@pytest.fixture(scope="module")
def profiled(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "profiled"
    # With nothing made further ahead, each step's batch is made while the one before it runs, however late that is.
    assert train.main(arguments(shards, run, STEPS, "--profile", str(TIMED), "--prefetch", "0")) == 0
    return run


def test_the_run_is_the_same_bit_for_bit(plain: Path, profiled: Path) -> None:
    assert same_weights(plain, profiled)
    one, other = optimizer_tensors(plain), optimizer_tensors(profiled)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert ledger(plain) == ledger(profiled)
    losses = [[row["loss"] for row in read_jsonl(run / "metrics.jsonl")] for run in (plain, profiled)]
    assert losses[0] == losses[1]
    assert not (plain / PROFILE).exists()
    assert not (plain / TRACE).exists()


def test_parts_are_the_whole_of_the_steps_that_were_asked_for(profiled: Path) -> None:
    row = profile_of(profiled)
    assert (row["first_step"], row["last_step"]) == (WARM_UP_STEPS + 1, WARM_UP_STEPS + TIMED)
    assert list(row["parts_ms"]) == [*LOADER, *PARTS, *LOGS]
    steps = row["steps_ms"]
    assert len(steps) == TIMED
    wholes = [sum(step.values()) for step in steps]
    assert row["step_ms"] == pytest.approx(sorted(wholes)[TIMED // 2])
    assert row["step_ms_range"] == pytest.approx([min(wholes), max(wholes)])
    assert sum(row["shares"].values()) == pytest.approx(1)
    assert row["data_wait_fraction"] == pytest.approx(row["shares"]["data_wait"])
    # A checkpoint every third step, a line every second: the other steps pass both by.
    saved = {step for step in range(1, STEPS + 1) if step % 3 == 0}
    for number, step in enumerate(steps, row["first_step"]):
        assert ("checkpoint" in step) == (number in saved or number % 2 == 0)
        assert min(step.values()) >= 0
    assert row["images_per_s"] == pytest.approx(32 * TIMED / sum(wholes) * 1e3)
    assert row["tokens_per_s"] == pytest.approx(10 * row["images_per_s"])
    assert row["mfu"] > 0
    for name, (low, high) in row["parts_ms_range"].items():
        assert low <= row["parts_ms"][name] <= high


def test_the_trace_shows_steps_their_parts_and_the_threads_that_make_batches(profiled: Path) -> None:
    events = events_of(profiled)
    steps = {event["name"]: event for event in events if str(event.get("name", "")).startswith("step ")}
    first = WARM_UP_STEPS + TIMED + 1
    assert list(steps) == [f"step {number}" for number in range(first, first + TRACED_STEPS)]
    parts = [event for event in events if event.get("cat") == "step_part"]
    for step in steps.values():
        begin, end = step["ts"] - 5, step["ts"] + step["dur"] + 5
        inside = [part for part in parts if begin <= part["ts"] and part["ts"] + part["dur"] <= end]
        assert [part["name"] for part in inside][: len(PARTS) + 1] == [*LOADER, *PARTS]
    made = [event for event in events if str(event.get("name", "")).startswith("make batch ")]
    assert made
    assert {event["tid"] for event in made}.isdisjoint({step["tid"] for step in steps.values()})
    assert 0 <= profile_of(profiled)["hidden_fraction"] <= 1


def test_a_step_that_is_laid_out_otherwise_has_the_same_parts(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    more = ("--accumulate", "2", "--grad-checkpointing")
    assert train.main(arguments(shards, one, 6, *more)) == 0
    capsys.readouterr()
    assert train.main(arguments(shards, other, 6, *more, "--workers", "1", "--profile", "2")) == 0
    assert same_weights(one, other)
    row = profile_of(other)
    assert set(row["parts_ms"]) == {*LOADER, *PARTS, *LOGS}
    assert row["hidden_fraction"] is None  # a worker's batches are on no line of the trace
    printed = capsys.readouterr().out
    assert all(f"\n{part} " in printed for part in (*LOADER, *PARTS, *LOGS, "step"))
    assert f"{row['images_per_s']:,.0f} img/s" in printed


def test_what_evaluation_encodes_is_no_part_of_a_step(shards: Path, tmp_path: Path) -> None:
    held_out, run = tmp_path / "held_out", tmp_path / "run"
    shutil.copytree(shards, held_out)
    names = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
    (held_out / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (held_out / "zeroshot_classification_templates.txt").write_text("a {c} square\n")
    more = ("--eval-data", str(held_out), "--eval-every", "1", "--profile", "2")
    assert train.main(arguments(shards, run, 4, *more)) == 0
    assert set(profile_of(run)["parts_ms"]) == {*LOADER, *PARTS, *LOGS, "evaluation"}
    parts = [event["name"] for event in events_of(run) if event.get("cat") == "step_part"]
    assert parts.count("evaluation") == parts.count("image_forward") == parts.count("text_forward") > 0


def test_no_gradient_lies_beside_the_next_step(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are as large as the weights: a step's memory holds them once."""
    plain_loss, plain_over_ranks = train.contrastive_loss, train.over_ranks
    kept: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def contrastive_loss(*inputs: Any, **more: Any) -> torch.Tensor:
        alive.append(sum(each() is not None for each in kept))
        return plain_loss(*inputs, **more)

    def over_ranks(
        loss: torch.Tensor, gradients: list[torch.Tensor], world: World
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept.extend(map(weakref.ref, gradients))
        return plain_over_ranks(loss, gradients, world)

    monkeypatch.setattr(train, "contrastive_loss", contrastive_loss)
    monkeypatch.setattr(train, "over_ranks", over_ranks)
    assert train.main(arguments(shards, tmp_path / "run", 3, "--grad-clip", "1")) == 0
    assert len(kept) > 30
    assert alive == [0, 0, 0]


def test_profiles_are_compared_as_benchmarks_are(profiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(profiled / PROFILE)
    assert compare.main([path, path]) == 0
    assert "nothing changed" in capsys.readouterr().out


def test_a_resumed_run_may_be_profiled_and_a_new_one_leaves_no_old_profile(
    plain: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(plain, run)
    assert train.main(arguments(shards, run, STEPS, "--profile", "3")) == 0
    assert "nothing to do; --profile has no step to time" in capsys.readouterr().out
    # Three steps are left: as many as can be are timed, and all the same the last of them is traced.
    assert train.main(arguments(shards, run, STEPS + 3, "--profile", "100")) == 0
    assert f"steps {STEPS + 1} to {STEPS + 1} (fewer than the 100 of --profile)" in capsys.readouterr().out
    assert profile_of(run)["first_step"] == STEPS + 1
    names = [event["name"] for event in events_of(run) if str(event.get("name", "")).startswith("step ")]
    assert names == [f"step {STEPS + 2}", f"step {STEPS + 3}"]
    assert train.main(arguments(shards, run, 1, "--resume", "never")) == 0
    assert not (run / PROFILE).exists()
    assert not (run / TRACE).exists()


class Counted:
    """In place of Rates, whose own arithmetic is not tested here."""

    def of(self, num_steps: int, elapsed_s: float) -> dict[str, float | None]:
        return {"images_per_s": num_steps / elapsed_s, "tokens_per_s": 1.0, "mfu": None}

    def leave_out(self, seconds: float) -> None:
        assert seconds >= 0


@pytest.mark.parametrize("wanted", [0, 1, 2, 7, 50])
@pytest.mark.parametrize("left", [1, 2, 3, 9, 70])
def test_steps_are_timed_wherever_any_are_left(tmp_path: Path, wanted: int, left: int) -> None:
    """After a warm-up where there is room for one, no more of them than were asked for, and traced last of all."""
    done = 4
    command = ["--steps", str(done + left), "--profile", str(wanted), "--device", "cpu", "--out", str(tmp_path)]
    (config,) = parse(command, "")
    rates: Any = Counted()
    profile = Profile(config, CLIP(TINY, grid=(1, 1), text_tokens=2), rates, World(), done)
    with profile:
        for step in range(done + 1, done + left + 1):
            profile.begin(step)
            profile.end("data_wait")
    if not wanted:
        assert list(tmp_path.iterdir()) == []
        return
    row = profile_of(tmp_path)
    num_timed = row["last_step"] + 1 - row["first_step"]
    assert len(row["steps_ms"]) == num_timed
    assert 1 <= num_timed <= wanted
    traced = [event["name"] for event in events_of(tmp_path) if str(event.get("name", "")).startswith("step ")]
    assert traced == [f"step {row['last_step'] + number}" for number in range(1, len(traced) + 1)]
    assert len(traced) == min(TRACED_STEPS, wanted, left - 1)
    assert done + 1 <= row["first_step"] <= done + 1 + WARM_UP_STEPS
    assert row["last_step"] + len(traced) <= done + left
    if left >= WARM_UP_STEPS + wanted + TRACED_STEPS:
        assert (row["first_step"], num_timed) == (done + 1 + WARM_UP_STEPS, wanted)
    elif num_timed < wanted:
        assert row["first_step"] == done + 1


def test_parts_that_come_several_times_in_a_step_are_added_up() -> None:
    """As with --accumulate, where each micro-batch is encoded twice; the parts are still the whole step."""
    model = CLIP(TINY, grid=(2, 2), text_tokens=4)
    inputs = (
        torch.zeros(4, 4, 768, dtype=torch.uint8),
        torch.arange(4, dtype=torch.int16).expand(4, 4),
        torch.ones(4, 4, dtype=torch.int32),
    )
    marks = Marks(torch.device("cpu"))
    with marked(model, marks.end, compiled=False):
        marks.begin()
        accumulated(
            lambda each: model(*each), lambda features: (features.image_features_BE * features.text_features_BE).sum(),
            inputs, 2, called=model, model=model, world=World(), mark=marks.end,
        )  # fmt: skip
    (times,), (parts,) = marks.seconds(), marks.milliseconds()
    encoded = ["embed", "image_forward", "text_forward"]
    assert [name for name, _ in times] == ["", *encoded, *encoded, "loss", *[*encoded, "backward"] * 2]
    assert sum(parts.values()) == pytest.approx(1e3 * (times[-1][1] - times[0][1]))
    assert parts["backward"] == pytest.approx(
        1e3 * sum(end - begin for (_, begin), (name, end) in itertools.pairwise(times) if name == "backward")
    )
    # Once the model is no longer marked, it tells nothing.
    model(*inputs)
    assert len(marks.seconds()[0]) == len(times)


def test_the_table_is_of_the_steps(tmp_path: Path) -> None:
    (config,) = parse(["--steps", "9", *SMALL], "")
    rates: Any = Counted()
    steps = [{"data_wait": 1.0, "loss": 3.0}, {"data_wait": 2.0, "loss": 2.0, "checkpoint": 4.0}, {"data_wait": 3.0}]
    found = summary(steps, config, rates, World())
    assert found["parts_ms"] == {"data_wait": 2.0, "loss": 2.0, "checkpoint": 0.0}
    assert found["shares"] == pytest.approx({"data_wait": 6 / 15, "loss": 5 / 15, "checkpoint": 4 / 15})
    assert found["images_per_s"] == pytest.approx(3 / 0.015)
    lines = [line.split() for line in table(found).splitlines()]
    assert ["loss", "2.00", "0.00", "3.00", "33.3%"] in lines
    assert ["step", "4.00", "3.00", "8.00", "100.0%"] in lines


def test_a_number_below_none_is_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(arguments(shards, tmp_path / "run", 2, "--profile", "-1")) == 2
    assert "error: --profile -1 is below 0" in capsys.readouterr().err
