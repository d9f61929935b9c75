"""The memory benchmark of the losses: what it writes, and what it refuses."""

import json
from pathlib import Path

import pytest

from benchmarks.loss_memory import LossMemory, Row, main, plot


def test_a_batch_below_one_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--batch-sizes", "64", "0"]) == 2
    assert capsys.readouterr().err == "error: --batch-sizes 0 is below 1\n"


def test_the_plot_takes_a_dense_loss_that_stops_early(tmp_path: Path) -> None:
    rows = [Row("infonce", False, 64, 2**20, 2**21), Row("infonce", True, 64, 2**19, 2**20)]
    rows.append(Row("infonce", True, 128, 2**20, 2**21))
    plot(rows, LossMemory(batch_sizes=(64, 128), json=tmp_path / "memory.json"))
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_dense_memory_grows_with_the_square_and_tiled_does_not(tmp_path: Path) -> None:
    """One matrix of 4,096 pairs is 64 MiB, and so is a tile; 8 features, so that nothing else counts.

    Held to what tensors take, which is the same in every run; what the process takes for them is the allocator's doing.
    """
    out = tmp_path / "memory.json"
    sizes = ["--batch-sizes", "4096", "8192", "16384"]
    assert main([*sizes, "--embed-dim", "8", "--dense-gib", "2", "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) == 2 * (2 + 3)
    peaks = {(row["kind"], row["tiled"], row["batch_size"]): row["tensor_bytes"] for row in rows}
    for kind in ("infonce", "sigmoid"):
        assert peaks[kind, False, 8192] > 3 * peaks[kind, False, 4096] > 3 * 2**27
        # Two tiles at a time, however many there are: none waits for the next to take its place.
        assert 2 * 2**26 < peaks[kind, True, 4096] < peaks[kind, True, 16384] < 2.2 * 2**26
    for row in rows:
        assert row["resident_bytes"] > 0.9 * row["tensor_bytes"], row
    assert out.with_suffix(".png").exists()
    assert main(["--batch-sizes", "8192", "--dense-gib", "0.1", "--json", str(out)]) == 0
    assert {row["tiled"] for row in json.loads(out.read_text())["rows"]} == {True}
