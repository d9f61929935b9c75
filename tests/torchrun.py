"""Starts train.py, or a script that breaks it on purpose, on several processes with the real torchrun."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from conftest import process_stat

ROOT = Path(__file__).parents[1]
PATIENCE_S = 600
"""For a machine that does much else: a run of these takes some seconds, with a compiler some more."""


_STARTED: "list[subprocess.Popen[str]]" = []


def start(world_size: int, *arguments: str, torchrun: tuple[str, ...] = (), **env: str) -> "subprocess.Popen[str]":
    """Starts `arguments` (a script and its own) on each rank; what all print comes as one stdout."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world_size)]
    process = subprocess.Popen(
        [*command, *torchrun, *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    _STARTED.append(process)
    return process


def end(process: "subprocess.Popen[str]") -> str:
    """Returns all that a process prints until it ends; ends it if it does not."""
    try:
        return process.communicate(timeout=PATIENCE_S)[0]
    except subprocess.TimeoutExpired:
        process.terminate()
        raise AssertionError(f"torchrun did not end:\n{process.communicate()[0]}") from None


def run(world_size: int, *arguments: str, torchrun: tuple[str, ...] = (), **env: str) -> str:
    """Runs to a good end. Returns what was printed."""
    process = start(world_size, *arguments, torchrun=torchrun, **env)
    output = end(process)
    assert process.returncode == 0, output
    return output


def wait_for(there: Callable[[], object], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not there():
        # Once more: it may have come to that and ended since.
        assert process.poll() is None or there(), f"it ended before that:\n{process.communicate()[0]}"
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)


def _children(parent: int) -> dict[int, list[bytes]]:
    """Returns the environment of each process that `parent` has started."""
    found: dict[int, list[bytes]] = {}
    for task in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process_stat(int(task.name))[1:2] == [str(parent)]:
                found[int(task.name)] = (task / "environ").read_bytes().split(b"\0")
    return found


def rank_pid(process: "subprocess.Popen[str]", rank: int) -> int:
    """Returns the process of a rank that torchrun has started."""
    return next(pid for pid, env in _children(process.pid).items() if f"RANK={rank}".encode() in env)


def kill_all(process: "subprocess.Popen[str]") -> None:
    """kill -9 on torchrun and on every rank, as a machine that loses its power."""
    if process.poll() is None:
        # Stopped, it starts no rank that would not be found below.
        process.send_signal(signal.SIGSTOP)
        while process_stat(process.pid)[:1] not in (["T"], []):
            time.sleep(0.001)
        for pid in (*_children(process.pid), process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.communicate()


def kill_left_over() -> None:
    """Ends what a failed test has left running."""
    while _STARTED:
        process = _STARTED.pop()
        if process.poll() is None:
            kill_all(process)
