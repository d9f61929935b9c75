"""The memory benchmark of the whole step: what it counts, what it writes, and what it refuses."""

import functools
import json
import os
from pathlib import Path

import pytest
import torch

from benchmarks.peak import in_own_process, peak_bytes, peak_of_tensors
from benchmarks.step_memory import Row, StepMemory, main, plot


def held_and_left(held: int, left: int) -> int:
    """What a measurement in a process of its own runs: by how much the peak rose."""
    before = peak_bytes()
    kept = torch.ones(held, dtype=torch.uint8)
    torch.ones(left, dtype=torch.uint8)
    assert len(kept) == held
    return peak_bytes() - before


def dies() -> None:
    raise RuntimeError("it could not")


def test_the_peak_of_tensors_is_that_of_those_alive_together() -> None:
    def run(together: bool) -> None:
        first = torch.empty(1 << 20)
        if not together:
            del first
        second = torch.empty(3 << 20)
        del second
        torch.empty(1 << 20)

    assert peak_of_tensors(functools.partial(run, True)) == 16 << 20
    assert peak_of_tensors(functools.partial(run, False)) == 12 << 20


def test_a_process_of_its_own_knows_no_peak_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    torch.ones(256 << 20, dtype=torch.uint8)
    assert peak_bytes() > 256 << 20
    found = in_own_process(held_and_left, 64 << 20, 32 << 20)
    # What is held and what was left, less what the kernel counts late and what had been freed before: some MiB.
    assert 90 << 20 <= found < 128 << 20
    with pytest.raises(ValueError, match="RuntimeError: it could not"):
        in_own_process(dies)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch-sizes", "4", "512"], "--batch-sizes 4 is below 8"),
        (["--batch-sizes", "512", "700"], "--micro 256 does not divide each of --batch-sizes; give a divisor of them"),
        (["--tokens", "17"], "--tokens 17 is no square number"),
        (["--model", "ViT-96x6-61"], "--model ViT-96x6-61 is not known"),
    ],
)
def test_what_cannot_be_measured_is_one_line(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_the_plot_takes_lines_that_stop_early(tmp_path: Path) -> None:
    rows = [
        Row("infonce", True, "whole", 64, 2**20, 2**21),
        Row("infonce", True, "micro-batches", 64, 2**20, 2**21),
        Row("infonce", True, "micro-batches", 128, 2**21, 2**22),
        Row("sigmoid", False, "checkpointing", 64, 2**20, 2**21),
    ]
    plot(rows, StepMemory(batch_sizes=(64, 128), json=tmp_path / "memory.json"))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_steps_memory_grows_as_its_layout_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The smallest model, so that 8,192 pairs are quick: one matrix of them is 256 MiB."""
    out = tmp_path / "memory.json"
    flags = ["--model", "ViT-Ti-16", "--tokens", "4", "--text-tokens", "4", "--losses", "infonce", "--json", str(out)]
    assert main([*flags, "--batch-sizes", "2048", "8192"]) == 0
    assert capsys.readouterr().out.count("MiB resident") == 3 * 2 * 2
    rows = [Row(**row) for row in json.loads(out.read_text())["rows"]]
    tensors = {(row.layout, row.tiled, row.batch_size): row.tensor_bytes for row in rows}
    for row in rows:
        # What the process takes is what its tensors do, and more.
        assert row.resident_bytes > 0.9 * row.tensor_bytes, row
    assert tensors["whole", True, 8192] > 3.5 * tensors["whole", True, 2048]
    assert tensors["micro-batches", True, 8192] < 0.5 * tensors["whole", True, 8192]
    assert tensors["micro-batches", False, 8192] - tensors["micro-batches", True, 8192] > 3 * 2**28
    assert out.with_suffix(".png").exists()
    assert main([*flags, "--batch-sizes", "2048", "8192", "--most-gib", "0.2"]) == 0
    assert {row["batch_size"] for row in json.loads(out.read_text())["rows"]} == {2048}
