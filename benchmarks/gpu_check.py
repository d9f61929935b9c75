"""Everything that only a GPU can show, in one command: `python -m benchmarks.gpu_check --json FILE --markdown FILE`.

Each part runs in a process of its own, so one that fails, dies or takes too long costs only itself; what it had found
is kept. A part whose libraries or device are missing is skipped and says so. Offline; torch and NumPy are all that most
parts need. The exit code is 0 where nothing failed, 1 where something did, 2 for what the user can mend.

`--device cpu --quick` runs those parts that a CPU can do, at tiny sizes: the same code, no figures of worth.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NoReturn

from .gpu_part import Context, Row, Skipped, Value

Status = Literal["passed", "FAILED", "skipped"]
_ROOT = Path(__file__).parents[1]
_LOADER = ("numpy", "simplejpeg", "cv2", "PIL", "pyarrow", "tokenizers", "tqdm", "fsspec")
_TRAIN = (*_LOADER, "tyro", "safetensors", "matplotlib")
_DISTRIBUTIONS = {
    "cv2": "opencv-python-headless", "PIL": "pillow", "nvidia.dali": "nvidia-dali-cuda120",
}  # fmt: skip
_GRACE_SECONDS = 20
"""That a part which watches its time may take beyond it before it is ended."""


@dataclass(frozen=True)
class Part:
    """One thing to show. `function`: of this package, as MODULE.NAME."""

    name: str
    function: str
    seconds: float
    """Its share of ten minutes."""
    about: str
    needs: tuple[str, ...] = ("numpy",)
    """Modules beside torch."""
    on_cpu: bool = True
    """Whether it can be tried on a CPU."""


PARTS = (
    Part("device", "gpu_step.describe_device", 20, "the machine and its rate of matrix products"),
    Part("attention", "gpu_attention.kernels_equal_math", 50, "attention kernels equal plain math, both ways"),
    Part("decode", "gpu_input.decodes_as_the_cpu", 70, "DALI on the GPU equals DALI on the CPU, four reductions",
         ("numpy", "simplejpeg", "nvidia.dali")),
    Part("damage", "gpu_input.survives_damage", 30, "damaged JPEGs are survived",
         (*_TRAIN, "nvidia.dali")),
    Part("learning", "gpu_step.learns", 50, "bf16 learns a made task as the CPU does"),
    Part("step", "gpu_step.step_table", 130, "the step: images/s, MFU, memory at the biggest batch"),
    Part("end_to_end", "gpu_input.end_to_end", 110, "required against measured decode rate, and both together",
         _LOADER),
    Part("starter", "gpu_input.starter_as_the_cpu", 130, "training the starter reaches the CPU's accuracy",
         _TRAIN, on_cpu=False),
    Part("compile", "gpu_step.compile_table", 110, "the step with and without torch.compile", on_cpu=False),
    Part("tests", "gpu_input.gpu_tests", 60, "the tests that need a GPU", (*_TRAIN, "pytest"), on_cpu=False),
)  # fmt: skip


@dataclass
class Found:
    """What became of a part."""

    name: str
    about: str
    status: Status = "passed"
    reason: str = ""
    """Why it failed or was skipped, or what was left out for lack of time."""
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list[Row])


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help lists the flags", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    asked = _parse(arguments)
    try:
        from .environment import environment
    except ImportError as error:
        print(f"error: {error}; gpu_check needs torch (docs/install-gpu.md)", file=sys.stderr)
        return 2
    if asked.run_part:
        return _in_this_process(asked)
    try:
        parts = chosen(asked.parts)
        if asked.device == "cpu" and not asked.quick:
            raise ValueError("--device cpu is for trying the code, at sizes that a CPU can do; add --quick")
        if asked.minutes <= 0:
            raise ValueError(f"--minutes {asked.minutes:g} is not above 0; 10 is what all parts are made for")
        if asked.data is not None and not asked.data.is_dir():
            raise ValueError(f"--data {asked.data} is no folder; give one with shards, or leave it out")
        for path in (asked.json, asked.markdown):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    before = environment()
    found: list[Found] = []
    deadline = time.monotonic() + 60 * asked.minutes
    for part in parts:
        print(f"{part.name}: {part.about} ...", file=sys.stderr, flush=True)
        found.append(run_part(part, asked, deadline))
        print(f"{part.name}: {found[-1].status} {found[-1].reason}".rstrip(), file=sys.stderr, flush=True)
        _write(asked, before, found)
    print(markdown(before, found, asked.device))
    return 1 if any(each.status == "FAILED" for each in found) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m benchmarks.gpu_check", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts: " + "; ".join(f"{part.name}, {part.about}" for part in PARTS),
    )  # fmt: skip
    parser.add_argument("--parts", nargs="+", metavar="PART", help="these only; default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for all parts together (default: 10)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for trying the code itself")
    parser.add_argument("--data", type=Path, help="a folder of shards; default: the starter, else made ones")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--markdown", type=Path, help="write the tables here")
    parser.add_argument("--run-part", help=argparse.SUPPRESS)
    parser.add_argument("--answers", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def chosen(names: Iterable[str] | None) -> list[Part]:
    """Returns the parts of those names, in their order here. Raises ValueError for a name that is none."""
    wanted = None if names is None else set(names)
    if wanted is not None and (strange := sorted(wanted - {part.name for part in PARTS})):
        raise ValueError(f"--parts {strange[0]} is not known; choose from {', '.join(part.name for part in PARTS)}")
    return [part for part in PARTS if wanted is None or part.name in wanted]


def missing(modules: Iterable[str]) -> list[str]:
    """Returns the distributions to install for those modules that are not here."""
    return [_DISTRIBUTIONS.get(module, module) for module in modules if not _is_here(module)]


def _is_here(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it would lie in
        return False


def why_skipped(part: Part, device: str, *, cuda: bool, seconds_left: float) -> str | None:
    """Returns why a part is not tried; None where it is. cuda: whether torch sees a CUDA device."""
    if device == "cuda" and not cuda:
        return "torch sees no CUDA device here (docs/install-gpu.md); --device cpu --quick tries the code"
    if device == "cpu" and not part.on_cpu:
        return "it says nothing on a CPU"
    if absent := missing(part.needs):
        return f"it needs {', '.join(absent)}, not installed here (pip install {' '.join(absent)})"
    if seconds_left < min(10, part.seconds):
        return "no time is left; raise --minutes, or name this part with --parts"
    return None


def run_part(part: Part, asked: argparse.Namespace, deadline: float) -> Found:
    """Runs a part in a process of its own and returns what became of it."""
    import torch

    found = Found(part.name, part.about)
    left = deadline - time.monotonic()
    if reason := why_skipped(part, asked.device, cuda=torch.cuda.is_available(), seconds_left=left):
        found.status, found.reason = "skipped", reason
        return found
    # A part alone may take all the time; among others, its share of it and what those before left over.
    seconds = left if asked.parts and len(set(asked.parts)) == 1 else min(left, part.seconds * asked.minutes / 10)
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder) / "answers.jsonl"
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--run-part", part.name, "--device", asked.device]
        command += ["--answers", str(answers), "--minutes", str(seconds / 60), *(["--quick"] if asked.quick else [])]
        command += ["--data", str(asked.data.resolve())] if asked.data else []
        output = Path(folder) / "output"
        with output.open("wb") as stream:
            try:
                code = subprocess.run(
                    command, cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream,
                    timeout=seconds + _GRACE_SECONDS, check=False, env={**os.environ, **_settings(asked.quick)},
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        found.seconds = time.monotonic() - begin
        _read_answers(answers, found)
        _judge_end(found, code, output.read_text(errors="replace"), seconds)
    return found


def _settings(quick: bool) -> dict[str, str]:
    """As train.py, threads of OpenMP do not spin while they wait; at tiny sizes one is enough."""
    return {"OMP_WAIT_POLICY": "passive", **({"OMP_NUM_THREADS": "1"} if quick else {})}


def _read_answers(path: Path, found: Found) -> None:
    for line in path.read_text().splitlines() if path.exists() else ():
        answer: dict[str, Any] = json.loads(line)
        if "row" in answer:
            found.rows.append(answer["row"])
        else:
            found.status, found.reason = answer["status"], answer["reason"]


def _judge_end(found: Found, code: int | None, output: str, seconds: float) -> None:
    """Makes a failure of a process that did not end by itself."""
    if code == 0:
        return
    last = " | ".join(line.strip() for line in output.strip().splitlines()[-3:])
    if code is None:
        how = f"ended after {seconds + _GRACE_SECONDS:.0f} s, in which it had to be done"
    elif code < 0:
        how = f"its process died of {signal.Signals(-code).name}"
    else:
        how = f"its process ended with {code}"
    found.status, found.reason = "FAILED", f"{how}; last said: {last[-600:]}" if last else how


def _in_this_process(asked: argparse.Namespace) -> int:
    """Runs one part here; rows and its end go to --answers, line by line. Returns 0 whatever became of it."""
    import torch

    (part,) = chosen([asked.run_part])
    with asked.answers.open("w") as stream:

        def say(answer: dict[str, Any]) -> None:
            print(json.dumps(answer), file=stream, flush=True)

        device = torch.device(asked.device, 0) if asked.device == "cuda" else torch.device("cpu")
        until = time.monotonic() + 60 * asked.minutes
        context = Context(device, asked.quick, until, lambda row: say({"row": row}), asked.data)
        status, reason = ended(part_function(part), context)
        say({"status": status, "reason": reason})
    return 0


def part_function(part: Part) -> Callable[[Context], None]:
    """Returns what does a part; what it needs is imported here."""
    module, _, name = part.function.partition(".")
    return getattr(import_module(f"{__package__}.{module}"), name)


def ended(function: Callable[[Context], None], context: Context) -> tuple[Status, str]:
    """Runs a part and returns its status and the reason for it."""
    try:
        function(context)
    except Skipped as reason:
        return "skipped", str(reason)
    except subprocess.TimeoutExpired as error:
        return "skipped", f"{error.cmd[1]} was not done in the {error.timeout:.0f} s that were left; raise --minutes"
    except Exception as error:  # whatever it is, it is this part's alone
        return "FAILED", "; ".join([*context.failures, f"{type(error).__name__}: {error}"])
    if context.failures:
        return "FAILED", "; ".join(context.failures)
    return "passed", f"for lack of time without {context.cut_short}" if context.cut_short else ""


def _write(asked: argparse.Namespace, before: dict[str, Any], found: Sequence[Found]) -> None:
    """After each part, so that what is known is kept whatever comes."""
    if asked.json:
        result = {"benchmark": "gpu_check", "device": asked.device, "quick": asked.quick, "environment": before}
        asked.json.write_text(json.dumps({**result, "parts": [asdict(each) for each in found]}, indent=1) + "\n")
    if asked.markdown:
        asked.markdown.write_text(markdown(before, found, asked.device) + "\n")


def markdown(before: dict[str, Any], found: Sequence[Found], device: str) -> str:
    """Returns the tables: one of the parts, then each part's own."""
    facts = ", ".join(f"{name} {value}" for name, value in before.items() if value is not None)
    lines = [f"Device {device}. {facts}.", ""]
    summary: list[Row] = [
        {"part": each.name, "shows": each.about, "result": each.status, "s": each.seconds, "why": each.reason}
        for each in found
    ]
    lines += _table(summary)
    for each in found:
        if each.rows:
            lines += ["", f"**{each.name}**: {each.about}", "", *_table(each.rows)]
    return "\n".join(lines)


def _table(rows: Sequence[Row]) -> list[str]:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    return [
        f"| {' | '.join(name.replace('_', ' ') for name in columns)} |",
        f"|{'---|' * len(columns)}",
        *(f"| {' | '.join(_cell(row.get(name)) for name in columns)} |" for row in rows),
    ]


def _cell(value: Value) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    sys.exit(main())
