"""Steps without a number are counted and end a run; spikes and waits are told of once."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import train
from training import checkpoint
from training.health import NON_FINITE_LIMIT, Advice, Skips
from training.metrics import read_jsonl

SMALL = ("--model", "ViT-Ti-16", "--tokens", "4", "--text-tokens", "6", "--batch-size", "8", "--device", "cpu",
         "--checkpoint-every", "2", "--log-every", "1")  # fmt: skip


def test_skips_count_in_all_and_in_a_row() -> None:
    skips = Skips(torch.device("cpu"), skipped=5)
    one, nan, inf = torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(math.inf)
    judged = [float(skips.judge(loss, norm)) for loss, norm in ((one, one), (nan, one), (one, inf))]
    assert judged == [0, 1, 1]
    assert skips.read() == (7, 2)
    skips.judge(one, one)
    assert skips.read() == (7, 0)


def test_too_many_in_a_row_stop_the_run_and_name_the_samples(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, first_bad, num_losses = tmp_path / "run", 4, 0
    plain = train.contrastive_loss

    def contrastive_loss(*arguments: Any, **more: Any) -> torch.Tensor:
        nonlocal num_losses
        num_losses += 1
        return plain(*arguments, **more) * (math.nan if num_losses >= first_bad else 1)

    monkeypatch.setattr(train, "contrastive_loss", contrastive_loss)
    assert train.main(["--data", str(shards), "--out", str(run), "--steps", "60", "--ledger", *SMALL]) == 2
    last_step = first_bad + NON_FINITE_LIMIT - 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: the loss or a gradient was not finite for 20 steps up to step {last_step}; ")
    named = [json.loads(line) for line in (run / "non_finite.jsonl").read_text().splitlines()]
    ids = read_jsonl(run / "ledger.jsonl")[-1]
    assert ids["step"] == last_step
    assert [entry["sample_id"] for entry in named] == ids["sample_ids"]
    # The shards hold sample n under the key n.
    assert [int(entry["key"]) for entry in named] == ids["sample_ids"]
    assert all(Path(entry["shard"]).is_file() for entry in named)
    assert named[0]["key"] in error
    assert [path.name for path in checkpoint.list_steps(run)] == ["step-00000002"]


def test_a_spike_is_told_of_once_and_noise_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    draw = torch.Generator().manual_seed(0)
    noise = (5 - torch.arange(400) / 200 + 0.2 * torch.randn(400, generator=draw)).tolist()
    advice = Advice()
    for step, loss in enumerate([math.nan, *noise], 1):
        advice.losses(step, [loss])
    assert capsys.readouterr().err == ""
    for step in (402, 403):
        advice.losses(step, [3.0, 6.5])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("warning: the loss rose to 6.500 at step 402, from ")
    assert "--grad-clip 1" in said[0]


def test_a_wait_for_data_is_told_of_once_and_not_at_the_start(capsys: pytest.CaptureFixture[str]) -> None:
    advice = Advice()
    for step, fraction in ((10, 0.9), (20, 0.09), (30, 0.11), (40, 0.5)):
        advice.data_wait(step, fraction)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("warning: 11% of the time up to step 30 went into waiting for data; raise --threads")
