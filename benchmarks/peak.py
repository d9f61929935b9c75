"""The most memory of a process, and of tensors alone; and functions run in processes of their own, to see it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

_ROOT = Path(__file__).parents[1]


def in_own_process(function: Callable[..., Any], *arguments: bool | int | str) -> Any:
    """Returns, as JSON has it, what a function of a module of this repository returns in a process of its own: what
    was done before counts in a process's peak. Raises ValueError, with its last words, where it dies."""
    # Of the command itself the module is __main__, which the other process has not.
    spec = sys.modules[function.__module__].__spec__
    assert spec is not None
    run = f"from {spec.name} import {function.__name__} as run"
    call = f"import json; {run}; print(json.dumps(run(*{arguments!r})))"
    # Threads that spin while they wait take the cores of whatever else runs here.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True, cwd=_ROOT, env=environment)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def peak_bytes() -> int:
    """Returns the most memory this process ever held. Linux only, as the rest of the benchmarks' figures.

    Not ru_maxrss: that begins with the peak of the process that started this one.
    """
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def peaks_of(run: Callable[[], object]) -> tuple[int, int]:
    """Returns the most bytes that the tensors of a function hold at once, and by how many it raised the peak of this
    process. Runs it twice: what the profiler takes down is memory too, so the process is looked at before."""
    before = peak_bytes()
    run()
    resident = peak_bytes() - before
    return peak_of_tensors(run), resident


def peak_of_tensors(run: Callable[[], object]) -> int:
    """Returns the most bytes that tensors made by a function held at once, on the CPU: what the process takes beyond
    that is between them, in the allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    assert recorded.profiler is not None
    # The events of the profiler's tables leave out in which order memory came and went.
    events: Any = recorded.profiler.kineto_results
    assert events is not None
    changes = sorted((each.start_ns(), each.nbytes()) for each in events.events() if each.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most
