"""The benchmarks of a training step and of loader and model together: rows, parts, products, what they compare with."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmarks.overlap
from benchmarks import end_to_end, step
from benchmarks.contenders import PEERS_PYTHON
from benchmarks.step_crossing import EndToEndRow, crossings, draw_crossing, format_crossings
from benchmarks.step_gemm import Gemm, GemmMeter, gemms
from benchmarks.step_model import Stepper, made_batches, real_batches
from benchmarks.step_report import Spread
from benchmarks.step_switches import SWITCHES, Switch, without
from model.presets import ModelConfig, model_config
from pipeline.tokens import token_geometry
from training.marks import PARTS, Marks
from training.trace import overlap


def small(name: str) -> ModelConfig:
    """Returns a preset cut to what takes milliseconds."""
    config = model_config(name)
    image = replace(config.image, width=32, heads=2, mlp_width=64)
    text = replace(config.text, width=32, layers=2, heads=2, mlp_width=64, vocabulary=100)
    return replace(config, image=image, text=text, embed_dim=16)


TINY, TINY_BPE = small("ViT-Ti-16"), small("ViT-Ti-16-bpe")
TINY_MEAN = replace(TINY, image=replace(TINY.image, pooling="patch_mean"))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Threads wait for each other where the cores have other work; conftest puts their number back."""
    torch.set_num_threads(1)


def make_stepper(config: ModelConfig = TINY, tokens: int = 4, batch_size: int = 4) -> Stepper:
    return Stepper(config, made_batches(config, token_geometry(tokens), batch_size, 4), device=CPU)


def run_step(*arguments: object) -> int:
    small = (
        "--model",
        "ViT-Ti-16",
        "--tokens",
        4,
        "--text-tokens",
        4,
        "--batch-size",
        4,
        "--rounds",
        2,
        "--steps",
        1,
        "--threads",
        1,
    )
    return step.main(list(map(str, (*small, *arguments))))


def test_rows_of_a_step(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot, missing = tmp_path / "out" / "step.json", tmp_path / "step.png", tmp_path / "venv" / "bin" / "python"
    options = ("--data", shards, "--json", out, "--plot", plot, "--peer", "open_clip", "--peers-python", missing)
    assert run_step(*options) == 0
    result = json.loads(out.read_text())
    assert result["environment"]["torch"] == torch.__version__
    assert "make peers" in result["skipped"]["open_clip"]
    (row,) = result["rows"]
    sizes = ("model", "tokens", "text_tokens", "batch_size", "device", "threads")
    assert [row[name] for name in sizes] == ["ViT-Ti-16", 4, 4, 4, "cpu", 1]
    low, high = row["images_per_s_range"]
    assert 0 < low <= row["images_per_s"] <= high
    assert row["tokens_per_s"] == pytest.approx(8 * row["images_per_s"])
    assert set(row["parts_ms"]) == set(PARTS)
    assert all(value >= 0 for value in row["parts_ms"].values())
    assert row["executed_gflop"] < row["model_gflop"]
    assert row["gflop_per_s"] == pytest.approx(row["model_gflop"] / row["step_ms"] * 1e3)
    assert row["mfu_of_data_sheet"] is None
    assert row["peak_memory_bytes"] > 1e7
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "make peers" in printed
    assert "image_forward ms" in printed


def test_what_each_thing_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # A compiler is not part of what is tested here.
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile_(model, backend="eager"))
    out = tmp_path / "step.json"
    assert run_step("--parts", "--json", out) == 0
    given = json.loads(out.read_text())["given"]
    assert [row["change"] for row in given] == [*(f"without {name}" for name in SWITCHES), "with torch.compile"]
    for row in given:
        assert 0 < row["speed"]["low"] <= row["speed"]["median"] <= row["speed"]["high"]


def test_parts_are_the_whole_step() -> None:
    stepper = make_stepper()
    parts = stepper.run_parts(3)
    assert [list(each) for each in parts] == [list(PARTS)] * 3
    assert all(sum(each.values()) > 0 for each in parts)
    # From a step's first mark to its last nothing is left out.
    marks = Marks(CPU)
    with stepper.marked(marks):
        marks.begin()
        stepper.step(stepper.batches[0], marks)
    (times,), (each,) = marks.seconds(), marks.milliseconds()
    assert [name for name, _ in times] == ["", *PARTS]
    assert sum(each.values()) == pytest.approx(1e3 * (times[-1][1] - times[0][1]))


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("config", [TINY, TINY_BPE], ids=["wordpiece", "bpe"])
def test_a_step_without_what_makes_it_fast_is_the_same_step(switch: Switch, config: ModelConfig) -> None:
    plain, fast = make_stepper(config), make_stepper(config)
    batch = plain.batches[0]
    for stepper in (plain, fast):
        stepper.step(batch)
    with without(plain, switch):
        losses = [plain.step(batch).item(), plain.step(batch).item()]
    assert losses == pytest.approx([fast.step(batch).item(), fast.step(batch).item()], rel=1e-4)
    # What was taken away is back.
    assert plain.step(batch).item() == pytest.approx(fast.step(batch).item(), rel=1e-4)
    assert losses[1] < losses[0] or math.isclose(losses[1], losses[0], rel_tol=1e-3)


@pytest.mark.parametrize("config", [TINY, TINY_BPE, TINY_MEAN], ids=["class", "bpe", "patch_mean"])
def test_products_are_what_torch_counts(config: ModelConfig) -> None:
    stepper = make_stepper(config, tokens=9, batch_size=8)
    with FlopCounterMode(display=False) as counter:
        stepper.step(stepper.batches[0])
    products = torch.ops.aten
    counted = sum(counter.get_flop_counts()["Global"].get(op, 0) for op in (products.mm, products.addmm))
    # The loss has two products of batch x batch x embed_dim, with two gradients each.
    expected = sum(product.step_flops for product in gemms(config, 8, 9, 4)) + 2 * 3 * 2 * 8 * 8 * config.embed_dim
    assert counted == pytest.approx(expected, rel=1e-6)


def test_rates_of_products() -> None:
    rates = GemmMeter([Gemm(64, 32, 48, 2), Gemm(64, 32, 48, 1, for_input=False)], CPU, torch.float32).measure()
    assert rates.model > 0
    assert rates.square > 0
    assert rates.model_per_cpu_s is not None
    assert rates.model_per_cpu_s > 0
    assert Gemm(64, 32, 48, 2).step_flops == 2 * 3 * 2 * 64 * 32 * 48


def test_batches_fit_their_geometry(shards: Path) -> None:
    geometry = token_geometry(49, image_reduction="random", image_size=224)
    for batches in (made_batches(TINY, geometry, 4, 6), real_batches(TINY, geometry, 4, 6, shards, count=2)):
        for batch in batches:
            assert batch.patches.shape == (4, 49, 768)
            assert batch.grid == (14, 14)
            assert batch.positions.diff(dim=1).gt(0).all()
            assert batch.positions.max() < 196
            assert batch.caption_ids.shape == (4, 6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch-size", "0"], "--batch-size 0 is below 1"),
        (["--model", "ViT-Tj-16"], "did you mean ViT-Ti-16"),
        (["--tokens", "17"], "17"),
        (["--threads", "0"], "--threads 0 is below 1"),
        (["--sweep"], "--sweep has its own tokens"),
        (["--parts", "--compile"], "leave --compile out"),
        (["--peer", "open_clip", "--precision", "bf16"], "fp32"),
        (["--data", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_one_line(options: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_step(*options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert words in errors[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.gpu
def test_parts_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    assert run_step("--device", "cuda", "--precision", "bf16", "--json", out) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["parts_ms"]) == set(PARTS)


@pytest.mark.interop
def test_open_clip_takes_turns(tmp_path: Path) -> None:
    if not PEERS_PYTHON.exists():
        pytest.skip("no .venv-peers; `make peers` makes it")
    out = tmp_path / "step.json"
    assert run_step("--peer", "open_clip", "--tokens", 16, "--json", out) == 0
    result = json.loads(out.read_text())
    (peer,) = result["peers"]
    assert peer["contender"] == "open_clip"
    assert peer["ours_over_open_clip"]["median"] > 0
    assert result["about"]["open_clip_torch"]


PEER = """#!{python}
import json, sys
print(json.dumps({{"peer": "open_clip"}}), flush=True)
sys.stdin.readline()
for turn, line in enumerate(sys.stdin):
    if turn == {turns}:
        sys.exit("RuntimeError: out of memory")
    print(json.dumps({{"images": 4, "cpu_s": 0.01, "wall_s": 0.01, "gemm_gflop_per_s": 1.0}}), flush=True)
"""


@pytest.mark.parametrize("turns", [0, 2, 9], ids=["at once", "in a round", "never"])
def test_a_peer_that_dies_leaves_our_rows(turns: int, tmp_path: Path) -> None:
    """It runs once to warm up, then once a round."""
    out, peer = tmp_path / "step.json", tmp_path / "python"
    peer.write_text(PEER.format(python=sys.executable, turns=turns))
    peer.chmod(0o755)
    assert run_step("--peer", "open_clip", "--peers-python", peer, "--json", out) == 0
    result = json.loads(out.read_text())
    assert len(result["rows"]) == 1
    assert len(result["peers"]) == (turns == 9)
    assert result["skipped"] == ({} if turns == 9 else {"open_clip": "RuntimeError: out of memory (exit status 1)"})


def run_end_to_end(data: Path, *arguments: object) -> int:
    small = ("--model", "ViT-Ti-16", "--text-tokens", 4, "--batch-size", 8, "--rounds", 2, "--steps", 4)
    return end_to_end.main(list(map(str, ("--data", data, *small, *arguments))))


def test_loader_and_model_together(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture, plot = tmp_path / "both.json", tmp_path / "trace.json", tmp_path / "both.png"
    options = ("--decoder", "turbo", "--checkpoint-every", 2, "--log-every", 2, "--json", out, "--plot", plot)
    assert run_end_to_end(shards, *options, "--trace", picture) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert set(row["parts_ms"]) == {"data_wait", *PARTS, "logging", "checkpoint"}
    assert row["bound_by"] in ("loader", "model")
    assert row["over_lesser"]["median"] > 0
    assert row["over_bound"]["median"] >= row["over_lesser"]["median"] - 1e-9
    assert 0 <= row["data_wait_fraction"] < 1
    assert 0 <= row["hidden_fraction"] <= 1
    assert plot.read_bytes().startswith(b"\x89PNG")
    events = json.loads(picture.read_text())["traceEvents"]
    names = [str(event.get("name", "")) for event in events]
    assert sum(name.startswith("make batch ") for name in names) >= 4
    assert names.count("backward") == 4
    assert "steps hid" in capsys.readouterr().out
    drawn = tmp_path / "overlap.png"
    assert benchmarks.overlap.main([str(picture), "--out", str(drawn)]) == 0
    assert capsys.readouterr().out.startswith(f"{row['hidden_fraction']:.1%} of the making of batches")
    assert drawn.read_bytes().startswith(b"\x89PNG")
    # A batch is made on another thread than the steps.
    threads = {event["tid"] for event in events if str(event.get("name", "")).startswith("make batch ")}
    steps = {event["tid"] for event in events if str(event.get("name", "")).startswith("step ")}
    assert threads.isdisjoint(steps)


def test_bad_input_of_both_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in ((["--steps", "1"], "--steps 1 is below 2"), ([], str(tmp_path))):
        assert run_end_to_end(tmp_path, *options) == 2
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(errors) == 1
        assert words in errors[0]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        ("[]", "is no Chrome trace"),
        ('{"traceEvents": [1]}', "is no Chrome trace"),
        ('{"traceEvents": []}', "holds no parts of"),
    ],
)
def test_what_shows_no_overlap_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    trace, out = tmp_path / "trace.json", tmp_path / "out.png"
    if content is not None:
        trace.write_text(content)
    assert benchmarks.overlap.main([str(trace), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {trace} {words}")
    assert not out.exists()


def both_row(tokens: int, loader: float, model: float, decoder: str = "turbo") -> EndToEndRow:
    lesser = min(loader, model)
    return EndToEndRow(
        model="m", data="d", decoder=decoder, tokens=tokens, image_reduction="resize", text_tokens=8, batch_size=8,
        threads=1, model_threads=1, device="cpu", images_per_s=lesser, images_per_s_range=(lesser, lesser),
        loader_images_per_s=loader, loader_images_per_s_range=(loader, loader), model_images_per_s=model,
        model_images_per_s_range=(model, model), loader_images_per_cpu_s=loader, model_images_per_cpu_s=model,
        bound_by="loader", over_lesser=Spread(1, 1, 1), over_bound=None, data_wait_fraction=0.0, parts_ms={"loss": 1.0},
        parts_ms_range={"loss": (1.0, 1.0)}, hidden_fraction=None,
    )  # fmt: skip


def test_the_crossing_is_where_both_are_equally_fast(tmp_path: Path) -> None:
    # A model of 16000 / tokens images/s and a loader of 1000: they meet at 16 tokens, between 9 and 25.
    rows = [both_row(tokens, 1000, 16000 / tokens) for tokens in (25, 4, 9, 49)]
    rows += [both_row(tokens, 10, 16000 / tokens, "dali") for tokens in (4, 9)]
    crossing, never = crossings(rows)
    assert crossing.tokens == pytest.approx(16)
    assert (never.decoder, never.tokens, never.always) == ("dali", None, "loader")
    assert "below 16 tokens it is input-bound" in format_crossings([crossing])
    assert "bound by the loader at every length" in format_crossings([never])
    draw_crossing(rows, tmp_path / "crossing.png")
    assert (tmp_path / "crossing.png").stat().st_size > 10_000


def test_overlap_counts_what_fell_into_computing() -> None:
    parts = [
        {"name": "data_wait", "ts": 0, "dur": 10},
        {"name": "backward", "ts": 10, "dur": 30},
        {"name": "data_wait", "ts": 40, "dur": 10},
    ]
    made = {"cat": "user_annotation", "name": "make batch 3", "ts": 5, "dur": 20}
    assert overlap([made], parts) == pytest.approx(15 / 20)
    # Before the first step nothing could hide it.
    assert overlap([{**made, "ts": -15}], parts) == 0
