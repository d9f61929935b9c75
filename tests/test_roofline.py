"""The cost planner: its arithmetic, what it says of published runs, and what it refuses."""

import json
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.published import RUNS, Stage


def planned(tmp_path: Path, *arguments: str) -> dict[str, object]:
    out = tmp_path / "plan.json"
    assert roofline.main([*arguments, "--json", str(out)]) == 0
    return json.loads(out.read_text())


def stages(plan: dict[str, object]) -> list[dict[str, float]]:
    found = plan["stages"]
    assert isinstance(found, list)
    return found


def test_flops_are_those_of_open_clips_profile() -> None:
    """162.03 + 13.30 GFLOPs forward for L/14 at 224 px and 77 text tokens; the loss is left out there."""
    gflops = roofline.training_gflops("ViT-L-14", Stage(256, 77, 1, 224), batch_size=0)
    assert gflops / 3 == pytest.approx(162.03 + 13.30, rel=0.01)


def test_hours_times_rate_are_the_samples(tmp_path: Path) -> None:
    (row,) = stages(planned(tmp_path, "--samples", "1e9", "--gpus", "4", "--mfu", "0.4"))
    assert row["gpu_hours"] * 3600 / 4 * row["images_per_s"] == pytest.approx(1e9)
    assert row["days"] == pytest.approx(row["gpu_hours"] / 4 / 24)
    assert row["gpu_hours"] * 3600 * 0.4 * 312e12 == pytest.approx(row["exaflops"] * 1e18)


def test_twice_the_mfu_is_half_the_hours_and_twice_the_input(tmp_path: Path) -> None:
    (slow,), (fast,) = (stages(planned(tmp_path, "--mfu", mfu)) for mfu in ("0.2", "0.4"))
    assert slow["gpu_hours"] == pytest.approx(2 * fast["gpu_hours"])
    assert slow["input"]["raw"]["cores"] * 2 == pytest.approx(fast["input"]["raw"]["cores"])  # type: ignore[index]


def test_small_shards_are_not_offered_for_large_images(tmp_path: Path) -> None:
    plan = planned(tmp_path, "--then", "179/32/512e6/224", "345/32/128e6/336")
    offered = [{name for name, need in row["input"].items() if need} for row in stages(plan)]  # type: ignore[attr-defined]
    assert offered == [{"raw", "128", "256"}, {"raw", "256"}, {"raw"}]


def test_the_published_hours_follow_from_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    """Each run's hours come out within a third of the published ones at the median MFU of the other runs."""
    assert roofline.main(["--published"]) == 0
    text = capsys.readouterr().out
    for run in RUNS:
        line = next(line for line in text.splitlines() if line.startswith(f"{run.name}  "))
        assert abs(float(line.split()[-1]) - 1) < 1 / 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "ViT-Z-14"], "--model ViT-Z-14 is not known"),
        (["--then", "179/32"], "--then 179/32 is not TOKENS/TEXT_TOKENS/SAMPLES"),
        (["--then", "179/0/1e6"], "each number must be 1 or more"),
        (["--rates", "/nowhere.json"], "--rates /nowhere.json"),
        (["--json", "/dev/null/plan.json"], "/dev/null"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert roofline.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
