"""Points of a sweep in, results.jsonl out: each point is trained, fine-tuned and validated by the verbs, as processes.

One process runs at a time. OUT/runs/POINT/{pretrain,finetune} are run folders, and beside them stands what each stage
cost; OUT/results.jsonl has a line for each finished point, whose checkpoints are deleted. Whatever interrupts the
queue, the same sweep on the same folder goes on: train.py from its newest checkpoint, the rest from what is written.
"""

import ctypes
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import write_text
from training import checkpoint
from training.preset import flags
from training.signals import INTERRUPTED

from .environment import environment
from .scaling_sweep import STAGES, Point, Sweep, config_of

RESULTS, RUNS = "results.jsonl", "runs"
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG of Linux's prctl
_LIBC = ctypes.CDLL(None)  # loaded here: after a fork little is safe


class Interrupted(Exception):
    """The queue was stopped; the same command goes on."""


def finished(out: Path) -> dict[str, dict[str, Any]]:
    """Returns the results of a folder by point. Raises ValueError, in one line, for a file that is none of ours."""
    path = out / RESULTS
    if not path.exists():
        return {}
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            rows[row["point"]] = row
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is no result; take it out, and its point is run again") from None
    return rows


def refuse_other_sweep(sweep: Sweep, out: Path) -> None:
    """Raises ValueError, in one line, where `out` has results of points that this sweep has otherwise."""
    there = finished(out)
    for point in sweep.points:
        if (row := there.get(point.name)) is None:
            continue
        for stage, values in point.stages.items():
            found = row["stages"][stage]
            for key in sorted(values.keys() | found.keys()):
                if values.get(key) != found.get(key):
                    raise ValueError(
                        f"{out} has results of another sweep: {stage}.{key} of {point.name} is {found.get(key)!r} "
                        f"there and {values.get(key)!r} here; use another --out"
                    )
        if lacking := [name for name, data in sweep.evaluation.items() if row["data"].get(name) != data]:
            raise ValueError(
                f"{out} has results that were not measured on {lacking[0]} of this sweep; use another --out"
            )


def run_all(sweep: Sweep, out: Path, device: str, tell: Callable[[str], None]) -> None:
    """Runs the points that are not finished, one after the other. tell: is given a line at each end of a point.

    Raises ValueError, in one line, for a stage that failed, and Interrupted.
    """
    there = finished(out)
    todo = [point for point in sweep.points if point.name not in there]
    for name in there:  # a kill may have come before this
        _drop_checkpoints(out / RUNS / name)
    for number, point in enumerate(todo, 1):
        tell(f"point {number} of {len(todo)}: {point.name}, {point.total_gflops:,.0f} GFLOP")
        row = run_point(point, sweep, out / RUNS / point.name, device)
        there[point.name] = row
        write_text(out / RESULTS, "".join(json.dumps(row) + "\n" for row in there.values()))
        _drop_checkpoints(out / RUNS / point.name)
        scores = ", ".join(f"{name} {accuracy(row, name, sweep.metrics):.1%}" for name in sweep.evaluation)
        tell(f"  {scores}; {_shown(row['wall_s'])} s, {_shown(row['cpu_s'])} CPU s")


def accuracy(row: Mapping[str, Any], name: str, metrics: Sequence[str]) -> float:
    """Returns the mean of the metrics on one shard set, a share. Raises ValueError where one was not measured."""
    found = row["measured"][name]
    for metric in metrics:
        if not isinstance(found.get(metric), int | float):
            raise ValueError(f'metrics: validate.py gives no "{metric}" on {row["data"][name]}')
    return sum(found[metric] for metric in metrics) / len(metrics)


def run_point(point: Point, sweep: Sweep, folder: Path, device: str) -> dict[str, Any]:
    """Returns a point's result, running what is not done of it. Raises as `run_all` does."""
    folder.mkdir(parents=True, exist_ok=True)
    costs: dict[str, dict[str, Any]] = {}
    init: Path | None = None
    for stage in STAGES:
        costs[stage] = _train(point, stage, folder, init, device)
        init = folder / stage
    assert init is not None
    measured = {name: _validate(init, name, data, folder, device) for name, data in sweep.evaluation.items()}
    row = {
        **point.record(),
        "data": dict(sweep.evaluation),
        "gflops": point.total_gflops,
        **{key: _sum([cost[key] for cost in costs.values()]) for key in ("cpu_s", "wall_s")},
        "costs": costs,
        "measured": measured,
        "environment": environment(),
    }
    for name in sweep.evaluation:
        accuracy(row, name, sweep.metrics)
    return row


def _drop_checkpoints(folder: Path) -> None:
    for stage in STAGES:
        shutil.rmtree(folder / stage / checkpoint.FOLDER, ignore_errors=True)


def _train(point: Point, stage: str, folder: Path, init: Path | None, device: str) -> dict[str, Any]:
    """Returns what a stage cost: CPU and wall seconds of its process, start and checkpoints included.

    Of a stage that was interrupted, the last process is measured and scaled to all steps, and `measured_share` says
    how much of them it did. None where that process ended unseen.
    """
    path, run = folder / f"{stage}.json", folder / stage
    if path.exists():
        return json.loads(path.read_text())
    total = config_of(point, stage).total_steps
    steps = checkpoint.list_steps(run)
    share = 1 - (checkpoint.step_of(steps[-1]) if steps else 0) / total
    arguments = [*flags(dict(point.stages[stage])), "--out", str(run), "--device", device, "--keep-checkpoints", "1"]
    if init is not None:
        arguments += ["--init", str(init)]
    cpu_s, wall_s, _ = _run("train", arguments, folder / f"{stage}.log", point.name)
    cost: dict[str, Any] = {"gflops": point.gflops[stage], "measured_share": share, "cpu_s": None, "wall_s": None}
    if share > 0:
        cost |= {"cpu_s": cpu_s / share, "wall_s": wall_s / share}
    write_text(path, json.dumps(cost) + "\n")
    return cost


def _validate(run: Path, name: str, data: str, folder: Path, device: str) -> dict[str, Any]:
    path = folder / f"validate-{name}.json"
    if not path.exists():
        arguments = [str(run), "--data", data, "--device", device]
        *_, text = _run("validate", arguments, folder / f"validate-{name}.log", folder.name)
        write_text(path, json.dumps(json.loads(text.splitlines()[-1])) + "\n")
    return json.loads(path.read_text())


def _run(verb: str, arguments: Sequence[str], log: Path, point: str) -> tuple[float, float, str]:
    """Returns CPU and wall seconds of a verb's process, and what it printed, which `log` keeps too."""
    spec = importlib.util.find_spec(verb)
    assert spec is not None
    assert spec.origin is not None
    started = time.perf_counter()
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, spec.origin, *arguments], stdout=file, stderr=subprocess.STDOUT, preexec_fn=_die_with_us
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            # Ctrl-C reached the process too; a second signal would be an impatient one.
            os.wait4(process.pid, 0)
            raise Interrupted from None
    process.returncode = code = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    if code == INTERRUPTED:
        raise Interrupted
    if code:
        said = [line for line in text.splitlines() if line.strip()] or ["nothing"]
        raise ValueError(f"{point}: {verb}.py ended with code {code} ({said[-1].removeprefix('error: ')}); see {log}")
    return usage.ru_utime + usage.ru_stime, time.perf_counter() - started, text


def _die_with_us() -> None:
    """A queue that is killed takes its process with it: the next queue would find the run folder taken."""
    if sys.platform == "linux":
        _LIBC.prctl(_DIE_WITH_PARENT, signal.SIGKILL)


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def _shown(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:,.0f}"
