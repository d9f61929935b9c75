"""Which folder a run of stages is measured and exported by, and what a command says where a package is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import export
from model.presets import model_config
from training.checkpoint_writer import CheckpointWriter
from training.stages import weights_folder

ROOT = Path(__file__).parents[1]


def stage(run: Path, name: str, before: str | None, *, steps: int = 4, done: int | None = None) -> None:
    """Writes what train.py leaves of a stage; done: the step of its checkpoint, None for none."""
    (run / name).mkdir(parents=True)
    init = None if before is None else str(run / before)
    (run / name / "config.json").write_text(json.dumps({"stage": name, "init": init, "steps": steps}))
    if done is not None:
        with CheckpointWriter(run / name, keep=1) as writer:
            writer.save(done, {"weight": torch.zeros(1)}, {}, {})


def test_the_last_finished_stage_is_taken_whatever_its_name(tmp_path: Path) -> None:
    stage(tmp_path, "pretrain", None, done=4)
    assert weights_folder(tmp_path)[0] == tmp_path / "pretrain"
    stage(tmp_path, "middle", "pretrain", done=4)
    stage(tmp_path, "finetune", "middle", done=2)
    folder, said = weights_folder(tmp_path)
    assert folder == tmp_path / "middle"
    assert said == f"{tmp_path} holds the stages pretrain, middle, finetune: this is middle, the last finished one"
    with CheckpointWriter(tmp_path / "finetune", keep=1) as writer:
        writer.save(4, {"weight": torch.zeros(1)}, {}, {})
    assert weights_folder(tmp_path)[0] == tmp_path / "finetune"
    # A stage of its own is what was asked for.
    assert weights_folder(tmp_path / "pretrain") == (tmp_path / "pretrain", None)


def test_of_stages_that_are_not_finished_the_last_with_a_checkpoint_is_taken(tmp_path: Path) -> None:
    stage(tmp_path, "pretrain", None)
    assert weights_folder(tmp_path) == (tmp_path, None)
    stage(tmp_path, "finetune", "pretrain", done=1)
    folder, said = weights_folder(tmp_path)
    assert folder == tmp_path / "finetune"
    assert said is not None
    assert said.endswith("this is finetune, none is finished")


def test_a_run_with_stages_is_exported_by_its_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from random_run import make_run

    config = model_config("ViT-Ti-16")
    for name, text_tokens in (("pretrain", 8), ("finetune", 16)):
        make_run(tmp_path / "run" / name, config, 4, text_tokens)
        path = tmp_path / "run" / name / "config.json"
        init = str(tmp_path / "run" / "pretrain") if name == "finetune" else None
        path.write_text(json.dumps({**json.loads(path.read_text()), "steps": 1, "init": init}))
    assert export.main([str(tmp_path / "run"), "--out", str(tmp_path / "clip" / "m.safetensors")]) == 0
    out = capsys.readouterr().out
    assert "this is finetune, the last finished one" in out
    assert "16 text tokens" in out


@pytest.mark.parametrize("verb", ["ingest.py", "validate.py", "export.py"])
def test_without_its_packages_a_command_ends_with_one_line(verb: str) -> None:
    # -S: without site-packages, as another Python than .venv's has it.
    done = subprocess.run([sys.executable, "-S", ROOT / verb, "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no module named ")
    assert done.stderr.endswith("here; run it with .venv/bin/python, or `make`\n")
    assert done.stderr.count("\n") == 1
