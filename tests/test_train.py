"""train.py and validate.py whole, on a small real shard set: what a user sees, and that nothing is lost."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ledger
from safetensors.torch import load_file

import export
import train
import validate
from training import checkpoint
from training.config import parse, resolved
from training.metrics import read_jsonl

ROOT = Path(__file__).parents[1]
SMALL = ["--model", "ViT-Ti-16", "--tokens", "4", "--text-tokens", "6", "--batch-size", "32", "--warmup-samples", "16",
         "--device", "cpu", "--log-every", "2", "--checkpoint-every", "3"]  # fmt: skip


def arguments(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--steps", str(steps), *SMALL, *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest, passed_over = checkpoint.newest(run)
    assert newest is not None
    assert passed_over == []
    return newest.model_tensors()


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


LONG = 30
"""Steps of a run that is to be stopped on its way: what stops it may come late on a loaded machine."""
PATIENCE_S = 600
"""For a process that takes some seconds."""


@pytest.fixture(scope="module")
def long(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "long"
    assert train.main(arguments(shards, run, LONG)) == 0
    return run


@pytest.fixture(scope="module")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(arguments(shards, run, 8)) == 0
    return run


def test_loss_falls_and_the_folder_is_what_the_contract_says(finished: Path) -> None:
    rows = read_jsonl(finished / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 3, 4, 6, 8]
    assert {"step", "samples_seen", "loss", "images_per_s", "data_wait_fraction"} <= rows[0].keys()
    assert {"tokens_per_s", "mfu", "memory_gib", "grad_norm", "skipped_steps", "checkpoint_wait_fraction"} <= rows[
        0
    ].keys()
    assert all(row["tokens_per_s"] == pytest.approx(10 * row["images_per_s"]) for row in rows)
    assert all(row["mfu"] > 0 and 0 <= row["checkpoint_wait_fraction"] < 1 for row in rows)
    assert rows[-1]["samples_seen"] == 8 * 32
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert len(ledger(finished)) == 8
    assert len(set(ledger(finished))) == 8
    config = json.loads((finished / "config.json").read_text())
    assert config["tokens"] == 4
    assert config["encoders"]["name"] == "ViT-Ti-16"
    assert [path.name for path in checkpoint.list_steps(finished)] == ["step-00000006", "step-00000008"]
    names = {path.name for path in checkpoint.list_steps(finished)[-1].iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}


def test_again_says_finished_and_touches_nothing(
    finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert train.main(arguments(shards, finished, 8)) == 0
    assert "is finished: 8 steps, 256 pairs; nothing to do" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_kill_9_and_the_same_command_equals_no_interruption(long: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(shards, run, LONG)]
    for wanted in (3, 9):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + PATIENCE_S
        while not any(checkpoint.step_of(path) >= wanted for path in checkpoint.list_steps(run)):
            assert time.monotonic() < deadline, "no checkpoint came"
            assert process.poll() is None, "it finished before it could be killed"
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)
    assert same_weights(run, long)
    assert ledger(run) == ledger(long)


def test_other_threads_and_prefetch_change_no_bit(finished: Path, shards: Path, tmp_path: Path) -> None:
    assert train.main(arguments(shards, tmp_path / "run", 8, "--threads", "3", "--prefetch", "0")) == 0
    assert same_weights(tmp_path / "run", finished)


def test_a_longer_run_goes_on_from_a_shorter_one(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main(arguments(shards, run, 3)) == 0
    assert train.main(arguments(shards, run, 5)) == 0
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [2, 3, 4, 5]


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(long: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), *arguments(shards, run, LONG)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):
                process.send_signal(signal.SIGINT)
                break
        rest = process.stdout.read()
        assert process.wait(timeout=PATIENCE_S) == train.INTERRUPTED, rest
    assert "the same command goes on from checkpoint" in rest
    assert "Traceback" not in rest
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S)
    assert same_weights(run, long)


def test_a_damaged_checkpoint_is_passed_over(finished: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "checkpoints" / "step-00000008" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    (run / "checkpoints" / "step-00000009.partial").mkdir()
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments(shards, run, 8)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0
    assert "passed over a damaged checkpoint" in done.stderr
    assert "model.safetensors is damaged" in done.stderr
    assert "resuming at step 6" in done.stdout
    assert same_weights(run, finished)
    assert [row["step"] for row in read_jsonl(run / "metrics.jsonl")] == [2, 3, 4, 6, 8]


def test_resume_never_starts_anew(finished: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train.main(arguments(shards, run, 3, "--seed", "5")) == 0
    assert train.main(arguments(shards, run, 8, "--resume", "never")) == 0
    assert same_weights(run, finished)


def test_resume_never_deletes_nothing_before_all_is_checked(
    finished: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    for more in (("--data", "/nowhere"), ("--batch-size", "300"), ("--eval-data", str(shards), "--eval-every", "2"),
                 ("--report-to", "wandb")):  # fmt: skip
        assert train.main([*arguments(shards, run, 8, "--resume", "never"), *more]) == 2
        assert same_weights(run, finished)


def test_what_follows_from_other_values_may_be_given(finished: Path, shards: Path) -> None:
    more = ("--image-size", "32", "--lanes", "32", "--precision", "fp32", "--decoder", "dali")
    assert train.main([*arguments(shards, finished, 8), *more]) == 0


def test_a_short_run_needs_no_warm_up_of_its_own(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["--data", str(shards), "--out", str(run), "--model", "ViT-Ti-16", "--tokens", "4", "--batch-size", "32"]
    assert train.main([*command, "--steps", "10", "--device", "cpu"]) == 0
    assert json.loads((run / "config.json").read_text())["warmup_samples"] == 32


def test_a_length_and_warm_up_that_nobody_gives_stay_those_of_the_run(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = ["--data", str(shards), "--out", str(run), "--model", "ViT-Ti-16", "--tokens", "4", "--batch-size", "32"]
    (config,) = parse(command, "")
    assert resolved(config, cuda=False).steps == 1_000
    for more, steps in ((("--steps", "10"), 10), ((), 10), (("--steps", "20"), 20)):
        assert train.main([*command, *more, "--device", "cpu"]) == 0
        config = json.loads((run / "config.json").read_text())
        assert (config["steps"], config["warmup_samples"]) == (steps, 32)
    assert train.main([*command, "--steps", "20", "--device", "cpu", "--resume", "never"]) == 0
    assert json.loads((run / "config.json").read_text())["warmup_samples"] == 64


def test_a_restart_by_torchrun_resumes_what_it_began_and_no_older_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*arguments(shards, tmp_path / "run", 3), "--resume", "never"]
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    assert train.main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    capsys.readouterr()
    assert train.main(command) == 0
    assert "is finished: 3 steps" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert train.main(command) == 0
    assert "is finished" not in capsys.readouterr().out


def test_too_many_bad_samples_stop_the_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from test_loader import damage

    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    for number in range(90, 100):
        damage(data, "00003.tar", f"{number:09d}")
    assert train.main(arguments(data, run, 80, "--checkpoint-every", "10")) == 2
    assert "over --max-bad-fraction 0.01" in (error := capsys.readouterr().err)
    assert "00003.tar: mend or remove it" in error
    assert train.main(arguments(data, run, 80, "--max-bad-fraction", "0.1")) == 0
    assert len(read_jsonl(run / "rejected.jsonl")) == 10


def test_a_full_disk_keeps_the_older_checkpoint(finished: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    limit = (finished / "checkpoints" / "step-00000008" / "model.safetensors").stat().st_size // 2
    script = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit})); " \
             "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); " \
             "import train; sys.exit(train.main(sys.argv[1:]))"  # fmt: skip
    command = [sys.executable, "-c", script, *arguments(shards, run, 12)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert same_weights(run, finished)


def test_keeping_one_checkpoint_survives_a_damaged_newer_one(finished: Path, shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "checkpoints" / "step-00000008" / "state.json").write_text("{")
    assert train.main(arguments(shards, run, 7, "--keep-checkpoints", "1")) == 0
    assert [path.name for path in checkpoint.list_steps(run)] == ["step-00000007"]
    assert checkpoint.newest(run)[0] is not None


def test_zero_shot_during_training_and_in_validation_agree(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    held_out = tmp_path / "held_out"
    shutil.copytree(shards, held_out)
    names = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
    (held_out / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (held_out / "zeroshot_classification_templates.txt").write_text("a {c} square\n")
    run = tmp_path / "run"
    more = ("--eval-data", str(held_out), "--eval-every", "30", "--lr", "2e-3", "--checkpoint-every", "1000")
    assert train.main([*arguments(shards, run, 60), *more]) == 0
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "zero_shot_top1" in row]
    assert [row["step"] for row in rows] == [30, 60]
    capsys.readouterr()
    report = tmp_path / "report.png"
    command = [str(run), "--data", str(held_out), "--baseline", str(shards), "--report", str(report)]
    # The training captions are `a red square`, so the classes are found there only under that name.
    assert validate.main(command) == 2
    assert "no caption there is one of the 8 class names" in capsys.readouterr().err
    (held_out / "classnames.txt").write_text("".join(f"a {name} square\n" for name in names))
    (held_out / "zeroshot_classification_templates.txt").write_text("{c}\n")
    assert validate.main(command) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["zero_shot_top1"] == pytest.approx(rows[-1]["zero_shot_top1"])
    assert found["zero_shot_top1"] > 0.5  # eight colours: chance is 0.125
    assert found["pixel_baseline_top1"] == 1  # it is the training set itself
    assert found["num_images"] == 203
    assert report.stat().st_size > 10_000
    assert validate.main([str(run), "--data", str(shards)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 <= found["retrieval_image_r1"] <= found["retrieval_image_r5"] <= 1
    assert 0 <= found["retrieval_text_r1"] <= found["retrieval_text_r10"] <= 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--tokens", "17"), "--tokens 17 is no square number"),
        (("--image-size", "224"), "--image-size 224 contradicts --tokens 4"),
        (("--model", "ViT-Ti-61"), "--model ViT-Ti-61 is not known; did you mean"),
        (("--batch-size", "300"), "--batch-size 300 exceeds the 203 usable samples"),
        (("--batch-size", "0"), "--batch-size 0 is below"),
        (("--samples", "1000"), "both --steps 8 and --samples 1000 are given"),
        (("--text-tokens", "1"), "--text-tokens 1 is below 2"),
        (("--lr", "7"), "--lr 7"),
        (("--lr", "1e-3", "--base-lr", "1e-5"), "both --lr 0.001 and --base-lr 1e-05 are given"),
        (("--base-lr", "9"), "--base-lr 9 comes to --lr 1.125, which is outside 0 to 1"),
        (("--ema", "1"), "--ema 1.0 is outside 0 to 1"),
        (("--accumulate", "5"), "--accumulate 5 does not divide the 32 pairs of a batch"),
        (("--milestone-every", "4"), "--milestone-every 4 is not a multiple of --checkpoint-every 3"),
        (("--peer-timeout", "1"), "--peer-timeout 1.0 is below 5"),
        (("--stage", "one"), "--stage one: there are no stages without a --preset"),
        (("--crop-area", "0.9", "0.4"), "crop area 0.9 0.4"),
        (("--grad-clip", "nan"), "--grad-clip nan is below 0"),
        (("--eval-every", "5"), "--eval-data and --eval-every go together"),
        (("--data", "/nowhere"), "--data /nowhere: no such folder"),
        (("--preset", "nowhere.toml"), "--preset nowhere.toml: no such file"),
        (("--attention", "flash"), "flash"),
    ],
)
def test_bad_input_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert train.main([*arguments(shards, tmp_path / "run", 8), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_an_unknown_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--tokns", "16"]) == 2
    assert capsys.readouterr().err == "error: unknown flag --tokns; did you mean --tokens?\n"


def test_another_config_in_the_folder_is_refused_by_name(
    finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*arguments(shards, finished, 8), "--lr", "0.5", "--seed", "1"]) == 2
    error = capsys.readouterr().err
    assert "--lr is 0.001 there and 0.5 here; --seed is 0 there and 1 here; use another --out" in error


def test_changed_shards_are_refused(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    assert train.main(arguments(data, run, 2)) == 0
    (data / "00000.tar").unlink()
    assert train.main(arguments(data, run, 4)) == 2
    assert "was trained on other data" in capsys.readouterr().err


def test_presets_are_flags_that_stand_first(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset = tmp_path / "p.toml"
    preset.write_text("seed = 9\nlr = 0.002\ncrop_area = [0.5, 0.9]\nledger = true\n")
    run = tmp_path / "run"
    assert train.main([*arguments(shards, run, 1), "--preset", str(preset), "--lr", "0.003"]) == 0
    config = json.loads((run / "config.json").read_text())
    assert (config["seed"], config["lr"], config["crop_area"], config["ledger"]) == (9, 0.003, [0.5, 0.9], True)
    assert len(read_jsonl(run / "ledger.jsonl")[0]["sample_ids"]) == 32
    preset.write_text("samples = 320\nseed = 9\n")
    assert train.main([*arguments(shards, tmp_path / "other", 1), "--preset", str(preset)]) == 0
    assert json.loads((tmp_path / "other" / "config.json").read_text())["steps"] == 1
    preset.write_text("sead = 9\n")
    assert train.main([*arguments(shards, run, 1), "--preset", str(preset)]) == 2
    assert 'unknown key "sead"; did you mean "seed"?' in capsys.readouterr().err
    preset.write_text("seed = [\n")
    assert train.main([*arguments(shards, run, 1), "--preset", str(preset)]) == 2
    assert "cannot be read as TOML" in capsys.readouterr().err


def test_shipped_presets_parse() -> None:
    from training.config import parse

    presets = sorted((ROOT / "training" / "presets").glob("*.toml"))
    assert presets
    for preset in presets:
        assert all(config.preset == preset for config in parse(["--preset", str(preset)], ""))


def test_stages_train_in_turn_each_from_the_one_before(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    preset = tmp_path / "two.toml"
    preset.write_text(
        'model = "ViT-Ti-16"\ntokens = 4\n[stages.small]\nsteps = 3\n[stages.large]\ntokens = 16\nsteps = 2\n'
    )
    common = (
        "--preset",
        str(preset),
        "--data",
        str(shards),
        "--batch-size",
        "32",
        "--text-tokens",
        "6",
        "--device",
        "cpu",
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*common, "--out", str(whole), "--base-lr", "8e-3"]) == 0
    assert "stage     large, 2 of 2" in capsys.readouterr().out
    configs = {name: json.loads((whole / name / "config.json").read_text()) for name in ("small", "large")}
    assert [(config["tokens"], config["steps"], config["lr"]) for config in configs.values()] == [
        (4, 3, 1e-3),
        (16, 2, 1e-3),
    ]
    assert configs["large"]["init"] == str(whole / "small")
    # A stage alone, and then the command without --stage, which finds that one finished.
    assert train.main([*common, "--out", str(parts), "--base-lr", "8e-3", "--stage", "large"]) == 2
    error = capsys.readouterr().err
    assert f"the stage large starts from the weights of small, and {parts / 'small'} has none; train --stage" in error
    assert train.main([*common, "--out", str(parts), "--steps", "3"]) == 2
    assert "--steps has no effect: each stage of " in capsys.readouterr().err
    assert train.main([*common, "--out", str(parts), "--base-lr", "8e-3", "--stage", "small"]) == 0
    assert not (parts / "large" / "config.json").exists()
    assert train.main([*common, "--out", str(parts), "--base-lr", "8e-3"]) == 0
    assert f"{parts / 'small'} is finished" in capsys.readouterr().out
    assert same_weights(parts / "large", whole / "large")
    # Both may be moved together, and a stage may be given weights of its own.
    parts.rename(tmp_path / "moved")
    assert train.main([*common, "--out", str(tmp_path / "moved"), "--base-lr", "8e-3"]) == 0
    given = [*common, "--out", str(tmp_path / "given"), "--base-lr", "8e-3", "--stage", "large"]
    assert train.main([*given, "--init", str(whole / "small")]) == 0
    assert same_weights(tmp_path / "given" / "large", whole / "large")
    state = weights(whole / "large")
    assert state["text.positions_LD"].shape[0] == 6
    assert export.main([str(whole), "--out", str(tmp_path / "x.safetensors")]) == 0
    assert f"{whole} holds the stages small, large: this is large, the last finished one" in capsys.readouterr().out


def test_a_signal_that_comes_as_a_stage_ends_is_answered_before_the_next(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "two.toml"
    preset.write_text('model = "ViT-Ti-16"\ntokens = 4\n[stages.small]\nsteps = 2\n[stages.large]\nsteps = 2\n')
    plain, num_losses = train.contrastive_loss, 0

    def contrastive_loss(*inputs: Any, **more: Any) -> torch.Tensor:
        nonlocal num_losses
        num_losses += 1
        if num_losses == 2:
            signal.raise_signal(signal.SIGTERM)
        return plain(*inputs, **more)

    monkeypatch.setattr(train, "contrastive_loss", contrastive_loss)
    command = ["--preset", str(preset), "--data", str(shards), "--out", str(tmp_path / "run"), "--batch-size", "32"]
    assert train.main([*command, "--device", "cpu"]) == train.INTERRUPTED
    output = capsys.readouterr().out
    assert "finished: 2 steps" in output
    assert "interrupted before this stage; the same command goes on with it" in output
    assert not (tmp_path / "run" / "large").exists()


def test_a_step_that_does_not_fit_the_device_is_one_line(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def contrastive_loss(*inputs: Any, **more: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(train, "contrastive_loss", contrastive_loss)
    assert train.main(arguments(shards, tmp_path / "run", 2)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: rank 0: CUDA out of memory; give --grad-checkpointing, ")
    assert error.count("\n") == 1


def test_milestones_stay(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    more = ("--checkpoint-every", "1", "--milestone-every", "2", "--keep-checkpoints", "1")
    assert train.main(arguments(shards, run, 5, *more)) == 0
    assert [path.name for path in checkpoint.list_steps(run)] == ["step-00000002", "step-00000004", "step-00000005"]


@pytest.mark.parametrize(
    "more", [("--accumulate", "4", "--grad-checkpointing"), ("--tiled-loss", "on"), ("--workers", "1")]
)
def test_how_the_work_is_laid_out_changes_no_loss(
    finished: Path, shards: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    assert train.main([*arguments(shards, run, 3), "--steps", "8", *more]) == 0
    found, plain = ([row["loss"] for row in read_jsonl(each / "metrics.jsonl")] for each in (run, finished))
    assert found == pytest.approx(plain, rel=1e-4)


def test_a_damaged_image_is_skipped_and_named_once(shards: Path, tmp_path: Path) -> None:
    from test_loader import damage

    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(shards, data)
    damage(data, "00003.tar", "000000090")
    # Twice: the loader has met the sample before the checkpoint that the second run goes on from.
    assert train.main(arguments(data, run, 1)) == 0
    assert train.main(arguments(data, run, 14, "--checkpoint-every", "4")) == 0
    rejected = read_jsonl(run / "rejected.jsonl")
    assert [(entry["key"], entry["reason"]) for entry in rejected] == [("000000090", "JPEG cannot be decoded")]
    assert read_jsonl(run / "metrics.jsonl")[-1]["rejected"] == 1
    state = json.loads((checkpoint.list_steps(run)[-1] / "state.json").read_text())
    assert state["known_bad"] == {"90": "JPEG cannot be decoded"}


def test_a_run_validates_with_the_vocabulary_it_was_trained_with(
    shards: Path, tmp_path: Path, clip_vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, vocabulary, data = tmp_path / "run", tmp_path / "merges.txt.gz", ("--data", str(shards))
    shutil.copy(clip_vocabulary, vocabulary)
    more = ("--model", "ViT-Ti-16-bpe", "--vocabulary", str(vocabulary))
    assert train.main([*arguments(shards, run, 1), *more]) == 0
    assert validate.main([str(run), *data]) == 0
    other = vocabulary.rename(tmp_path / "elsewhere.txt.gz")
    assert validate.main([str(run), *data, "--vocabulary", str(other)]) == 0
    capsys.readouterr()
    assert validate.main([str(run), *data, "--vocabulary", str(vocabulary)]) == 2  # the flag wins
    assert capsys.readouterr().err.startswith(f"error: {vocabulary} is no file, so the CLIP BPE vocabulary is missing")


def test_validate_refuses_a_url_in_one_line(finished: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--data", "https://host/set"], ["--data", str(shards), "--baseline", "https://host/set"]):
        assert validate.main([str(finished), *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {more[-2]} https://host/set is a URL; copy the shards")
        assert error.count("\n") == 1


def test_validate_without_a_run(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main([str(tmp_path / "none"), "--data", str(shards)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_checkpoints_hold_no_pickle(finished: Path) -> None:
    for path in checkpoint.list_steps(finished)[-1].iterdir():
        assert path.suffix in (".safetensors", ".json")
        if path.suffix == ".safetensors":
            assert load_file(path)
