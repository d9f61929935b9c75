"""How train.py begins, or does not: what is answered before torch is loaded, Ctrl-C, and what is left behind."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_train import arguments, same_weights

import train
from model.presets import PRESETS
from pipeline import processes
from training import checkpoint
from training.start import BEFORE_FIRST_STEP

ROOT = Path(__file__).parents[1]

# A module whose name is in $AT, once it is asked for, sends Ctrl-C to its own process.
CTRL_C_AT = """
import os, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""


def start(*command: str, options: tuple[str, ...] = (), **environment: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, *options, str(ROOT / "train.py"), *command],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def imported(stderr: str) -> set[str]:
    """The modules of -X importtime's lines."""
    return set(re.findall(r"^import time:.*\| +(\S+)$", stderr, re.MULTILINE))


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (("--help",), 0, "--tokens"),
        (("--tokns", "16"), 2, "error: unknown flag --tokns; did you mean --tokens?"),
        (("--tokens", "17"), 2, "error: --tokens 17 is no square number"),
        (("--model", "ViT-Ti-61"), 2, "error: --model ViT-Ti-61 is not known"),
        (("--preset", "nowhere.toml"), 2, "error: --preset nowhere.toml: no such file"),
    ],
)
def test_help_and_what_cannot_be_are_answered_without_torch(command: tuple[str, ...], code: int, words: str) -> None:
    done = start(*command, options=("-X", "importtime"))
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    modules = imported(done.stderr)
    assert "training.config" in modules
    assert not modules & {"torch", "cv2", "pyarrow", "matplotlib"}


def test_help_names_models_presets_and_the_doctor() -> None:
    shown = " ".join(start("--help").stdout.replace("│", " ").split())
    for name in PRESETS:
        assert re.search(rf"(?<![\w-]){re.escape(name.removesuffix('-bpe'))}(?![\w-])", shown), name
    assert "NAME-bpe" in shown
    assert "--doctor" in shown
    assert "--profile" in shown
    assert "training/presets/" in shown
    for preset in (ROOT / "training" / "presets").glob("*.toml"):
        assert preset.stem.partition("-")[0] in shown, preset
        assert preset.stem in (ROOT / "docs" / "training.md").read_text(), preset


@pytest.mark.parametrize("module", ["numpy", "tyro", "torch.nn", "training.profile"])
def test_ctrl_c_while_modules_are_loaded_is_one_line(tmp_path: Path, module: str) -> None:
    (tmp_path / "sitecustomize.py").write_text(CTRL_C_AT)
    done = start("--steps", "5", "--out", str(tmp_path / "run"), PYTHONPATH=str(tmp_path), AT=module)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", f"{BEFORE_FIRST_STEP}\n")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_after_that_and_before_the_first_step_leaves_nothing(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CTRL_C_AT)
    command = arguments(shards, tmp_path / "runs" / "run", 5, "--report-to", "tensorboard")
    done = start(*command, PYTHONPATH=str(tmp_path), AT="tensorboard")
    assert (done.returncode, done.stderr) == (130, f"{BEFORE_FIRST_STEP}\n")
    assert not (tmp_path / "runs").exists()


def test_what_is_refused_late_leaves_no_folder(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    kept = tmp_path / "kept"
    kept.mkdir()
    for more in (
        ("--data", str(tmp_path / "none")),
        ("--batch-size", "300"),
        ("--init", str(tmp_path / "none")),
        ("--eval-data", str(shards), "--eval-every", "2"),
        ("--report-to", "wandb"),
    ):
        assert train.main([*arguments(shards, tmp_path / "a" / "b" / "run", 8), *more]) == 2
        assert not (tmp_path / "a").exists(), more
        # Of a folder that was there, only what this put into it.
        assert train.main([*arguments(shards, kept / "run", 8), *more]) == 2
        assert list(kept.iterdir()) == []
    assert "wandb" in capsys.readouterr().err


def test_a_folder_that_holds_anything_stays_with_all_of_it(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("mine")
    assert train.main([*arguments(shards, run, 8), "--batch-size", "300"]) == 2
    assert (run / "notes.txt").read_text() == "mine"


def test_fewer_steps_than_are_done_are_said_to_be_so(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert train.main(arguments(shards, run, 6)) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train.main(arguments(shards, run, 2)) == 0
    printed = capsys.readouterr().out
    assert "has done 6 steps, more than the 2 that are asked for; nothing to do. For a run of 2 steps give" in printed
    assert "is finished" not in printed
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_stage_starts_from_a_finished_one(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    preset, out = tmp_path / "two.toml", tmp_path / "out"
    common = 'model = "ViT-Ti-16"\ntokens = 4\ntext_tokens = 6\nbatch_size = 32\n'
    preset.write_text(f"{common}[stages.pretrain]\nsteps = 4\n[stages.finetune]\nsteps = 2\n")
    command = ["--preset", str(preset), "--data", str(shards), "--device", "cpu"]
    whole, into = [*command, "--out", str(out)], ["--stage", "finetune"]
    assert train.main([*whole, "--stage", "pretrain", "--checkpoint-every", "3"]) == 0
    shutil.copytree(out, tmp_path / "finished")
    shutil.rmtree(checkpoint.list_steps(out / "pretrain")[-1])
    capsys.readouterr()
    assert train.main([*whole, *into]) == 2
    error = capsys.readouterr().err
    assert "error: the stage finetune starts from the weights of pretrain, which is unfinished: " in error
    assert "has 3 of 4 steps; train --stage pretrain to its end first, or give --init" in error
    assert error.count("\n") == 1
    assert not (out / "finetune").exists()
    # As the line says: elsewhere, and from what is named, it may; and is told of.
    named = ["--init", str(out / "pretrain")]
    assert train.main([*command, "--out", str(tmp_path / "other"), *into, *named]) == 0
    assert "an unfinished run, 3 of 4 steps" in capsys.readouterr().out
    # All stages in one command, and this one after the other: both go on as before.
    assert train.main(whole) == 0
    assert train.main([*command, "--out", str(tmp_path / "finished"), *into]) == 0
    assert "unfinished" not in capsys.readouterr().out
    assert same_weights(out / "finetune", tmp_path / "finished" / "finetune")


def test_a_folder_without_shards_is_answered_by_where_they_are(
    shards: Path, photo_jpegs: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(folder: Path) -> str:
        assert train.main(arguments(folder, tmp_path / "run", 2)) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --data {folder}: no .tar shards in it; ")
        assert error.count("\n") == 1
        return error

    sets = tmp_path / "sets"
    for name in ("retrieval", "zero_shot"):
        shutil.copytree(shards, sets / name)
    assert f"its folder {sets / 'retrieval'} has some; so has zero_shot\n" in said(sets)
    shutil.copytree(shards, sets / "train")
    assert f"its folder {sets / 'train'} has some; so have retrieval, zero_shot\n" in said(sets)
    for name in ("a.jpg", "cats/b.JPEG"):
        folder = tmp_path / "pictures" / name.partition(".")[0].replace("/", "-")
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_bytes(photo_jpegs[0])
        assert f"it holds pictures: `python ingest.py folder {folder} --out DIR` makes shards of them" in said(folder)
    (tmp_path / "empty").mkdir()
    assert "give the folder that holds NNNNN.tar files" in said(tmp_path / "empty")
    # Where nothing of a recipe was kept, its report is the only picture.
    for name in ("recipe.json", "report.png"):
        (tmp_path / "empty" / name).write_text("{}")
    assert f"`python ingest.py status {tmp_path / 'empty'}` says what became of its rows" in said(tmp_path / "empty")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="worker processes need Linux's memory files")
def test_a_worker_that_hangs_is_named_and_replaced(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from test_loader import new_loader, same
    from test_slabs import workers_of

    plain = processes._Processes._replace

    def replace(*arguments: Any, **more: Any) -> None:
        plain(*arguments, **more)
        processes.HANG_S = 60.0  # the new one takes seconds to begin

    monkeypatch.setattr(processes._Processes, "_replace", replace)
    expected = new_loader(shards).batches(0, 12)
    stopped: list[int] = []
    for step, (one, other) in enumerate(zip(new_loader(shards).batches(0, 12, workers=2), expected, strict=True)):
        assert same(one, other), step
        if step == 3:
            monkeypatch.setattr(processes, "HANG_S", 1.0)
            stopped.append(workers_of(os.getpid())[0])
            os.kill(stopped[0], signal.SIGSTOP)
    lines = [line for line in capfd.readouterr().err.splitlines() if f"(process {stopped[0]})" in line]
    assert len(lines) == 1
    assert re.match(
        r"worker \d of the loader .* gave no answer for 1 s while it made step \d+; started again", lines[0]
    )
    assert workers_of(os.getpid()) == []
