"""What may be another when a run goes on, and faults that only a resume or several ranks meet."""

import json
import os
import pickle
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchrun
from conftest import ledger

import train
from training import checkpoint
from training.health import NON_FINITE_LIMIT
from training.metrics import read_jsonl

LIMITED = str(torchrun.ROOT / "tests" / "limited_train.py")
FAULTY = str(torchrun.ROOT / "tests" / "faulty_train.py")
SMALL = ("--model", "ViT-Ti-16", "--tokens", "4", "--text-tokens", "6", "--batch-size", "32", "--warmup-samples", "16",
         "--device", "cpu", "--log-every", "1")  # fmt: skip


def arguments(data: Path, out: Path, steps: int, *more: str) -> list[str]:
    return ["--data", str(data), "--out", str(out), "--steps", str(steps), *SMALL, *more]


def weights(run: Path) -> dict[str, torch.Tensor]:
    newest, passed_over = checkpoint.newest(run)
    assert newest is not None
    assert passed_over == []
    return {**newest.model_tensors(), **newest.optimizer_tensors()}


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    yield
    torchrun.kill_left_over()


def test_sigterm_and_then_other_threads_prefetch_and_workers_change_no_bit(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was made ahead when the signal came is made again, by others."""
    whole, run, stop_at = tmp_path / "whole", tmp_path / "run", 0
    assert train.main(arguments(shards, whole, 9)) == 0
    plain, num_losses = train.contrastive_loss, 0

    def contrastive_loss(*inputs: Any, **more: Any) -> torch.Tensor:
        nonlocal num_losses
        num_losses += 1
        if num_losses == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return plain(*inputs, **more)

    monkeypatch.setattr(train, "contrastive_loss", contrastive_loss)
    done = 0
    for step, more in ((3, ("--prefetch", "8")), (6, ("--threads", "3", "--prefetch", "0"))):
        num_losses, stop_at = 0, step - done
        assert train.main(arguments(shards, run, 9, *more)) == train.INTERRUPTED
        assert checkpoint.list_steps(run)[-1].name == f"step-{step:08d}"
        done = step
    assert train.main(arguments(shards, run, 9, "--workers", "2")) == 0
    assert ledger(run) == ledger(whole)
    assert len(set(ledger(run))) == 9
    found, wanted = weights(run), weights(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)


class Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_checkpoint_that_is_a_pickle_is_one_line_and_is_not_unpickled(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its manifest is in order, as of somebody who can write the run folder."""
    run, canary = tmp_path / "run", tmp_path / "canary"
    assert train.main(arguments(shards, run, 2)) == 0
    (path,) = checkpoint.list_steps(run)
    (path / "model.safetensors").write_bytes(pickle.dumps(Canary(canary)))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["model.safetensors"] = checkpoint.file_entry(path / "model.safetensors")
    (path / "manifest.json").write_text(json.dumps(manifest))
    capsys.readouterr()
    assert train.main(arguments(shards, run, 4)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "model.safetensors" in error
    assert error.count("\n") == 1
    other = arguments(shards, tmp_path / "other", 2, "--init", str(run))
    assert train.main(other) == 2
    assert "model.safetensors" in capsys.readouterr().err
    assert not canary.exists()
    # What was offered would have done it.
    pickle.loads((path / "model.safetensors").read_bytes())
    assert canary.exists()


@pytest.mark.slow
def test_too_many_steps_without_a_number_on_one_rank_stop_all_and_name_the_samples_of_all(
    shards: Path, tmp_path: Path
) -> None:
    run, first_bad = tmp_path / "run", 3
    faulty = ",".join(map(str, range(first_bad, first_bad + NON_FINITE_LIMIT)))
    process = torchrun.start(2, FAULTY, f"loss:{faulty}", "1", str(tmp_path), *arguments(shards, run, 60, "--ledger"))
    output = torchrun.end(process)
    assert process.returncode != 0
    last_step = first_bad + NON_FINITE_LIMIT - 1
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, output
    assert f"was not finite for {NON_FINITE_LIMIT} steps up to step {last_step}; " in said[0]
    assert "lost rank" not in output
    named = read_jsonl(run / "non_finite.jsonl")
    last = read_jsonl(run / "ledger.jsonl")[-1]
    assert last["step"] == last_step
    assert [entry["sample_id"] for entry in named] == last["sample_ids"]
    assert len(named) == 32


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard",)])
def test_a_full_disk_ends_all_ranks_and_keeps_the_older_checkpoint(
    more: tuple[str, ...], shards: Path, tmp_path: Path
) -> None:
    run, whole = tmp_path / "run", tmp_path / "whole"
    steps = ("--checkpoint-every", "2", *more)
    torchrun.run(2, "train.py", *arguments(shards, whole, 6, *steps))
    # The limit holds from the second checkpoint on, on every rank, as on the file system that they share.
    process = torchrun.start(2, LIMITED, "4", *arguments(shards, run, 6, *steps))
    output = torchrun.end(process)
    assert process.returncode != 0
    said = [line for line in output.splitlines() if line.startswith("error: ")]
    # With --shard each rank writes, and so each may meet it first.
    assert 1 <= len(said) <= (2 if more else 1), output
    for line in said:
        assert re.search(r"step-00000004 cannot be written \(.*the older checkpoints are untouched", line), said
    assert 'train.py", line' not in output, "that of torchrun, which has children that failed, is its own"
    assert [path.name for path in (run / checkpoint.FOLDER).iterdir()] == ["step-00000002"]
    torchrun.run(2, "train.py", *arguments(shards, run, 6, *steps))
    found, wanted = weights(run), weights(whole)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert ledger(run) == ledger(whole)
