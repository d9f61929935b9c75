"""What benchmarks.compare says of two results: beyond the noise, within it, or not to be told."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare


def result(rate: float, spread: float = 0.5, **changes: Any) -> dict[str, Any]:
    row = {
        "contender": "ours",
        "model": "ViT-B-16",
        "tokens": 16,
        "images_per_s": rate,
        "images_per_s_range": [rate - spread, rate + spread],
        "parts_ms": {"loss": 3.0},
        "parts_ms_range": {"loss": [2.9, 3.1]},
        "peak_memory_bytes": 100,
        "over_open_clip": {"median": rate / 10, "low": rate / 10 - 0.1, "high": rate / 10 + 0.1},
        **changes,
    }
    return {"environment": {"cpu": "x", "commit": "a"}, "rows": [row], "skipped": {}}


def run(tmp_path: Path, before: object, after: object) -> int:
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, value in zip(paths, (before, after), strict=True):
        path.write_text(value if isinstance(value, str) else json.dumps(value))
    return compare.main(list(map(str, paths)))


def test_beyond_and_within_the_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    after = result(12.0, parts_ms={"loss": 3.05}, peak_memory_bytes=150)
    assert run(tmp_path, result(10.0), after) == 0
    (line,) = capsys.readouterr().out.splitlines()
    who, _, said = line.partition(": ")
    assert who == "ours ViT-B-16 tokens=16"
    beyond, within, unknown = said.split("; ")
    assert beyond == "beyond the noise: images_per_s 10 -> 12 (+20.0%)"
    assert "over_open_clip 1 -> 1.2 (+20.0%)" in within
    assert "parts_ms.loss 3 -> 3.05 (+1.7%)" in within
    assert unknown == "no spread kept: peak_memory_bytes 100 -> 150 (+50.0%)"


def test_a_change_is_beyond_the_noise_in_either_direction_only_where_the_ranges_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for before, after, found in ((10.0, 8.9, "beyond the noise"), (10.0, 9.1, "within it"), (10.0, 10.0, "nothing")):
        assert run(tmp_path, result(before), result(after)) == 0
        assert found in capsys.readouterr().out
    assert run(tmp_path, result(10.0, spread=0.0), result(10.01, spread=0.0)) == 0
    assert "beyond the noise: images_per_s" in capsys.readouterr().out


def test_rows_are_matched_by_what_they_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before, after = result(10.0), result(10.0)
    before["rows"].insert(0, {**before["rows"][0], "tokens": 49})
    after["peers"] = [{**after["rows"][0], "contender": "open_clip"}]
    after["environment"]["commit"] = "b"
    assert run(tmp_path, before, after) == 0
    assert capsys.readouterr().out.splitlines() == [
        "environment: commit a -> b",
        "ours ViT-B-16 tokens=16: nothing changed",
        "ours ViT-B-16 tokens=49: only in the file before",
        "open_clip ViT-B-16 tokens=16: only in the file after",
    ]


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json")))
def test_results_of_every_benchmark_can_be_compared(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(path), str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.endswith("nothing changed") for line in lines)


@pytest.mark.parametrize(
    ("after", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no rows"),
        ({"rows": [{"model": "only a name"}]}, "holds no rows"),
        (result(10.0, tokens=25), "no row in common"),
    ],
)
def test_bad_input_is_one_line(after: object, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, result(10.0), after) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ")
    assert words in error


def test_a_missing_file_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main([str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "a.json" in error
