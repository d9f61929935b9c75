import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import inverse_scaling, paper, scaling_probe, scaling_queue
from benchmarks.roofline import Stage, training_gflops
from benchmarks.scaling_fit import Measurement, drops, fit, needed
from benchmarks.scaling_sweep import load

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "benchmarks" / "sweeps").glob("*.toml"))

SWEEP = """
full_tokens = 9
models = ["ViT-Ti-16"]
tokens = [4, 9]
text_tokens = [8]
[train]
data = ["DATA"]
steps = 40
batch_size = 16
warmup_samples = 16
checkpoint_every = 5
threads = 1
[finetune]
steps = 4
[evaluation]
held-out = "DATA"
"""


def write_sweep(folder: Path, data: Path | str = "data", text: str = SWEEP, **changes: str) -> Path:
    text = text.replace("DATA", str(data))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    path = folder / "sweep.toml"
    path.write_text(text)
    return path


def measurement(model: str, tokens: int, accuracy: float, seed: int = 0, reduction: str = "resize") -> Measurement:
    return Measurement(model, reduction, tokens, 16, seed, accuracy, 10.0 * tokens, 5.0 * tokens, 3.0 * tokens)


def write_results(out: Path, sweep_file: Path, accuracy_of: Callable[[Any], float]) -> None:
    """Writes results of every point of a sweep as the queue does, with made-up accuracies."""
    sweep = load(sweep_file)
    out.mkdir()
    rows = [
        {
            **point.record(),
            "data": dict(sweep.evaluation),
            "gflops": point.total_gflops,
            "cpu_s": 2 * point.total_gflops,
            "wall_s": point.total_gflops,
            "measured": {name: dict.fromkeys(sweep.metrics, accuracy_of(point)) for name in sweep.evaluation},
        }
        for point in sweep.points
    ]
    (out / scaling_queue.RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))


# Curves


@given(st.floats(0.1, 20), st.floats(0.1, 3.5), st.sampled_from([49, 196]))
def test_a_curve_is_found_again(a: float, b: float, full: int) -> None:
    lengths = {n: a * ((full / n) ** b - 1) for n in (4, 9, 16, 25)}
    curve = fit(lengths, full)
    assert curve is not None
    for n, drop in lengths.items():
        assert abs(curve.drop(n) - drop) < 0.01 * lengths[4]
    assert curve.drop(full) == 0
    middle = lengths[16]
    if middle > 0.02 * lengths[4]:
        assert abs(curve.tokens_within(middle) - 16) < 1.5


@given(st.dictionaries(st.integers(2, 48), st.floats(-50, 50), min_size=3, max_size=6), st.floats(0.1, 30))
def test_needed_tokens_lie_between_the_shortest_and_the_full_length(lengths: dict[int, float], points: float) -> None:
    curve = fit(lengths, 49)
    assert curve is not None
    assert min(lengths) <= curve.tokens_within(points) <= 49
    assert curve.tokens_within(points) >= curve.tokens_within(2 * points)


def test_too_few_lengths_give_no_fit_and_say_so() -> None:
    found = needed({4: {0: 9.0, 1: 8.0}, 9: {0: 3.0}}, 49, 1)
    assert found.per_seed == {}
    assert str(found) == "no fit: 2 shorter lengths of a seed, 3 are needed"


def test_points_far_from_any_curve_give_no_fit() -> None:
    assert "lie" in str(needed({4: {0: 0.0}, 9: {0: 20.0}, 16: {0: 1.0}}, 49, 1))


def test_seeds_are_fitted_apart_and_their_range_is_said() -> None:
    lengths = {n: {seed: (1 + seed) * ((49 / n) - 1) for seed in (0, 1)} for n in (4, 9, 16)}
    found = needed(lengths, 49, 1)
    assert found.per_seed == pytest.approx({0: 49 / 2, 1: 49 / 1.5}, abs=0.3)
    assert str(found) == "29 (24 to 33)"
    assert str(needed(lengths, 49, 100)) == "4 or fewer"
    assert str(needed({n: {0: drop[0]} for n, drop in lengths.items()}, 49, 1)) == "24 (one seed)"


def test_drops_are_taken_within_a_seed_and_need_its_full_length() -> None:
    found = [
        measurement("a", 49, 50, seed=0),
        measurement("a", 4, 40, seed=0),
        measurement("a", 49, 30, seed=1),
        measurement("a", 4, 10, seed=1),
        measurement("a", 16, 45, seed=0, reduction="block"),
        measurement("a", 4, 12, seed=2),
        measurement("b", 4, 12),
    ]
    assert drops(found, 49) == {("a", "resize", 16): {4: {0: 10, 1: 20}}, ("a", "block", 16): {16: {0: 5}}}


def test_the_papers_sweep_shows_its_law() -> None:
    """Its text: within 1 point, S/16 needs 100 tokens and L/16 49; within 2, B/16 needs 36 by resizing."""
    curves = {model: fit(paper.drops(model), paper.FULL_TOKENS) for model in paper.MODELS}
    tokens = [curve.tokens_within(1) for curve in curves.values() if curve is not None]
    assert 49 < tokens[0] <= 100
    assert tokens[0] > tokens[1] > tokens[2]
    assert tokens[2] <= 49
    assert paper.drops("B/16")[36] == 2.1
    assert paper.drops("L/16", "block")[98] == -0.3
    for model, line in paper.COMPUTE.items():
        assert list(line) == sorted(line), model
        if model in paper.FULL:
            assert [top1 for _, top1 in line] == [
                *(paper.ACCURACY[model]["resize", n] for n in (16, 36, 49, 100)),
                paper.FULL[model],
            ]


# Sweep files


def test_a_sweep_has_a_point_for_each_combination_and_counts_its_flops(tmp_path: Path) -> None:
    also = '[[also]]\ntokens = [4]\nimage_reductions = ["random", "block"]\nseeds = [0]\n'
    sweep = load(
        write_sweep(tmp_path, text=SWEEP.replace("text_tokens = [8]", "text_tokens = [8]\nseeds = [0, 1]") + also)
    )
    assert len(sweep.points) == 2 * 2 + 2
    assert len({point.name for point in sweep.points}) == 6
    order = [(point.seed, point.total_gflops) for point in sweep.points]
    assert order == sorted(order)
    for point in sweep.points:
        assert point.gflops["pretrain"] == training_gflops(point.model, Stage(point.tokens, 8, 1, 1), 16) * 640
        assert point.gflops["finetune"] == training_gflops(point.model, Stage(9, 8, 1, 1), 16) * 64
        masked = point.image_reduction != "resize"
        assert point.stages["pretrain"].get("image_size") == (48 if masked else None)
        assert "image_size" not in point.stages["finetune"]


def test_flags_of_a_model_go_over_the_common_ones_and_under_the_fine_tunes(tmp_path: Path) -> None:
    text = SWEEP.replace('["ViT-Ti-16"]', '["ViT-Ti-16", "ViT-S-16"]').replace(
        "steps = 4\n", "steps = 4\nbeta2 = 0.9\n"
    )
    sweep = load(write_sweep(tmp_path, text=text + "[of_model.ViT-S-16]\nlr = 5e-4\nbeta2 = 0.99\n"))
    for point in sweep.points:
        small = point.model == "ViT-S-16"
        assert [point.stages[stage].get("lr") for stage in ("pretrain", "finetune")] == [5e-4 if small else None] * 2
        assert point.stages["pretrain"].get("beta2") == (0.99 if small else None)
        assert point.stages["finetune"]["beta2"] == 0.9


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_sweeps_that_come_with_the_program_can_be_run(path: Path) -> None:
    sweep = load(path)
    assert len({point.tokens for point in sweep.points}) >= 4
    assert any(point.tokens == sweep.full_tokens for point in sweep.points)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("models", "modles", 'unknown key "modles"; did you mean "models"?'),
        ("full_tokens = 9", "full_tokens = 8", "full_tokens = 8 is no square"),
        ("text_tokens = [8]", "text_tokens = [8]\nseeds = [-1]", "seeds = -1 is outside 0 to 2**63"),
        ("full_tokens = 9", "", 'key "full_tokens" is missing'),
        ("tokens = [4, 9]", "tokens = [4, 5]", "--tokens 5 is no square number"),
        ("tokens = [4, 9]", "tokens = 4", "tokens = 4 must be a list"),
        ("tokens = [4, 9]", "tokens = []", "tokens is empty; give at least one"),
        ("ViT-Ti-16", "ViT-Tiny", "--model ViT-Tiny is not known"),
        ("batch_size = 16", "batch_sise = 16", 'unknown key "pretrain.batch_sise"; did you mean "batch_size"?'),
        ("batch_size = 16", "seed = 1", "train.seed is decided by each point; leave it out"),
        ("[finetune]", "[of_model.ViT-S-16]\nlr = 1e-3\n[finetune]", 'unknown key "of_model.ViT-S-16"'),
        ("steps = 4\n", "steps = 4\nlr = 7\n", "--lr 7, which is outside 0 to 1"),
        ('held-out = "data"', "", "evaluation names no shard set"),
        ("full_tokens", "full_tokens = = ", "sweep.toml"),
    ],
)
def test_a_bad_sweep_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    path = write_sweep(tmp_path, **{old: new})
    assert inverse_scaling.main([str(path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_sweep_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert inverse_scaling.main([str(tmp_path / "none.toml"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# Results


def test_a_finished_sweep_is_not_run_again_but_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = SWEEP.replace("full_tokens = 9", "full_tokens = 49").replace("[4, 9]", "[4, 9, 16, 49]")
    also = '[[also]]\ntokens = [16]\nimage_reductions = ["random"]\n'
    path = write_sweep(tmp_path, text=text + also, data="nowhere")
    share = {"resize": {4: 0.30, 9: 0.50, 16: 0.56, 49: 0.60}, "random": {16: 0.55}}
    write_results(tmp_path / "out", path, lambda point: share[point.image_reduction][point.tokens])
    before = (tmp_path / "out" / scaling_queue.RESULTS).read_bytes()
    # The data is nowhere: any process would fail.
    assert inverse_scaling.main([str(path), "--out", str(tmp_path / "out"), "--within", "5"]) == 0
    printed = capsys.readouterr().out
    assert (tmp_path / "out" / scaling_queue.RESULTS).read_bytes() == before
    lines = {tuple(line.split()[:3]): line.split() for line in printed.splitlines()}
    assert lines["ViT-Ti-16", "resize", "9"][3:7] == ["8", "1", "50.0", "10.0"]
    assert lines["ViT-Ti-16", "random", "16"][3:7] == ["8", "1", "55.0", "5.0"]
    curve = fit({4: 30, 9: 10, 16: 4}, 49)
    assert curve is not None
    assert f"{curve.tokens_within(5):.0f} (one seed)" in printed
    assert "no fit: 1 shorter length of a seed, 3 are needed" in printed
    assert "CLIPA L/16" in printed
    for kind in ("drop", "compute", "strategies"):
        assert (tmp_path / "out" / f"{kind}-held-out.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "report.txt").read_text().rstrip() in printed

    assert inverse_scaling.main([str(path), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "0 of 5 points to run" in capsys.readouterr().out


def test_a_dry_run_takes_times_from_other_seeds_and_other_lengths(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_sweep(tmp_path, **{"text_tokens = [8]": "text_tokens = [8]\nseeds = [0, 1]"})
    write_results(tmp_path / "out", path, lambda point: 0.5)
    sweep = load(path)
    there = scaling_queue.finished(tmp_path / "out")
    kept = {name: row for name, row in there.items() if (row["tokens"], row["seed"]) == (9, 0)}
    found = scaling_probe.estimates(sweep, kept, "cpu", lambda line: pytest.fail(line))
    sources = {(point.tokens, point.seed): found[point.name].source for point in sweep.points if point.name in found}
    assert sources == {(4, 0): "scaled", (4, 1): "scaled", (9, 1): "measured"}
    for point in sweep.points:
        if point.name in found:
            assert found[point.name].seconds == pytest.approx(point.total_gflops)
    assert inverse_scaling.main([str(path), "--out", str(tmp_path / "none"), "--dry-run", "--device", "cpu"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("probe") == 4
    assert "4 of 4 points to run" in printed.out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("batch_size = 16", "batch_size = 32", "pretrain.batch_size of ViT-Ti-16-resize-4-text-8-seed-0 is 16 there"),
        ('held-out = "', 'held-out = "other/', "not measured on held-out of this sweep"),
    ],
)
def test_results_of_another_sweep_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, said: str
) -> None:
    write_results(tmp_path / "out", write_sweep(tmp_path), lambda point: 0.5)
    path = write_sweep(tmp_path, **{old: new})
    for more in ([], ["--dry-run"], ["--report"]):
        assert inverse_scaling.main([str(path), "--out", str(tmp_path / "out"), *more]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1


def test_a_damaged_line_and_an_unknown_metric_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, text='metrics = ["zero_shot_top9"]\n' + SWEEP)
    write_results(tmp_path / "out", path, lambda point: 0.5)
    results = tmp_path / "out" / scaling_queue.RESULTS
    text = results.read_text()
    results.write_text(text.replace("zero_shot_top9", "other"))
    assert inverse_scaling.main([str(path), "--out", str(tmp_path / "out"), "--report"]) == 2
    assert 'validate.py gives no "zero_shot_top9" on data' in capsys.readouterr().err
    results.write_text(text[:-30])
    assert inverse_scaling.main([str(path), "--out", str(tmp_path / "out"), "--report"]) == 2
    assert "results.jsonl, line 2 is no result" in capsys.readouterr().err


def test_a_stage_that_fails_is_one_line_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_sweep(tmp_path, data=tmp_path / "nowhere")
    assert inverse_scaling.main([str(path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ViT-Ti-16-resize-4-text-8-seed-0: train.py ended with code 2 (")
    assert "nowhere" in error
    assert error.count("\n") == 1


# The queue, with real processes


def start(path: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.inverse_scaling", str(path), "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (out.parent / f"{out.name}.log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)


def killed_when(path: Path, out: Path, there: Callable[[], bool]) -> None:
    process = start(path, out)
    while not there():
        assert process.poll() is None, (out.parent / f"{out.name}.log").read_text()
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_queue_killed_again_and_again_ends_as_one_that_was_left_alone(tmp_path: Path, shards: Path) -> None:
    # So long that the first kill, which may come late on a loaded machine, comes while it trains.
    path = write_sweep(tmp_path, data=shards, **{"steps = 40": "steps = 120"})
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(path, whole).wait() == 0, (tmp_path / "whole.log").read_text()
    first, second = (point.name for point in load(path).points)
    runs = broken / scaling_queue.RUNS
    killed_when(path, broken, lambda: any((runs / first / "pretrain").glob("checkpoints/step-*[0-9]/manifest.json")))
    killed_when(path, broken, lambda: (runs / first / "finetune").exists())
    killed_when(path, broken, lambda: (broken / scaling_queue.RESULTS).exists())
    line = (broken / scaling_queue.RESULTS).read_text()
    assert json.loads(line)["point"] == first
    killed_when(path, broken, lambda: (runs / second / "finetune.json").exists())
    assert start(path, broken).wait() == 0, (tmp_path / "broken.log").read_text()
    assert (broken / scaling_queue.RESULTS).read_text().startswith(line)

    left_alone, others = scaling_queue.finished(whole), scaling_queue.finished(broken)
    assert list(left_alone) == list(others) == [first, second]
    for name, row in left_alone.items():
        assert others[name]["measured"]["held-out"] | {"run": ""} == row["measured"]["held-out"] | {"run": ""}
        assert others[name]["gflops"] == row["gflops"]
        assert row["cpu_s"] > 0
        assert row["costs"]["pretrain"]["measured_share"] == 1
    assert others[first]["costs"]["pretrain"]["measured_share"] < 1
    assert not any(broken.rglob("*.safetensors"))
    assert (broken / "drop-held-out.png").exists()
    finished_again = (broken / scaling_queue.RESULTS).stat()
    assert start(path, broken).wait() == 0
    assert (broken / scaling_queue.RESULTS).stat().st_mtime_ns == finished_again.st_mtime_ns
