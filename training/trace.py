"""A Chrome trace of steps and of the batches made beside them, from torch.profiler; and how far the two overlap.

Open the file in Perfetto or chrome://tracing. Each step and its parts stand on lines of their own, each batch on the
line of the thread that made it.
"""

import json
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch._C._profiler import _ExperimentalConfig  # pyright: ignore[reportPrivateUsage]
from torch.profiler import ProfilerActivity, profile, record_function

from pipeline.batch import Batch
from pipeline.loader import Loader

# Read at the first profile: without it each prints two lines of its own on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

STEP, MAKE, WAIT = "step ", "make batch ", "data_wait"
PART = "step_part"
"""Category of the parts of a step among the events."""
_PARTS_LINE = "parts of a step"


class TracedLoader(Loader):
    """A loader whose batches show in a trace, where threads of this process make them."""

    def batch(self, step: int) -> Batch:
        with record_function(f"{MAKE}{step}"):
            return super().batch(step)


def profiler() -> profile:
    """Returns torch's profiler, for `with` or start() and stop(): all threads, and the GPU where there is one."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(activities=activities, experimental_config=_ExperimentalConfig(profile_all_threads=True))


def write_trace(stopped: profile, marks: Sequence[Sequence[tuple[str, float]]], out: Path) -> float:
    """Writes the trace `out` of a profiler that was stopped. Returns what share of the batches' making steps hid.

    marks: for each step, which stood inside record_function("step N"), when it began ("") and when each part ended,
    by time.perf_counter, in seconds.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    stopped.export_chrome_trace(str(out))
    found = json.loads(out.read_text())
    events: list[dict[str, Any]] = found["traceEvents"]
    parts = _part_events(events, marks)
    events += parts
    out.write_text(json.dumps(found))
    return overlap(events, parts)


def _part_events(
    events: Sequence[dict[str, Any]], marks: Sequence[Sequence[tuple[str, float]]]
) -> list[dict[str, Any]]:
    """Returns the parts as events; a step's event and its first mark are the same moment on two clocks."""
    steps = sorted((e for e in events if is_named(e, STEP)), key=lambda event: event["ts"])
    assert len(steps) == len(marks), (len(steps), len(marks))
    found: list[dict[str, Any]] = []
    for event, own in zip(steps, marks, strict=True):
        begin = own[0][1]
        for (_, start), (part, end) in pairwise(own):
            found.append(
                {
                    "ph": "X",
                    "cat": PART,
                    "name": part,
                    "pid": event["pid"],
                    "tid": _PARTS_LINE,
                    "ts": event["ts"] + 1e6 * (start - begin),
                    "dur": 1e6 * (end - start),
                }
            )
    return found


def overlap(events: Sequence[dict[str, Any]], parts: Sequence[dict[str, Any]]) -> float:
    """Returns the share of the time in which batches were made that fell into a step's computing, not its waiting.

    What was made before the first step and after the last is left out.
    """
    computing = [(e["ts"], e["ts"] + e["dur"]) for e in parts if e["name"] != WAIT]
    first, last = (pick(e["ts"] + at * e["dur"] for e in parts) for pick, at in ((min, 0), (max, 1)))
    made = hidden = 0.0
    for event in events:
        if not is_named(event, MAKE):
            continue
        start, end = max(event["ts"], first), min(event["ts"] + event["dur"], last)
        made += max(0.0, end - start)
        hidden += sum(max(0.0, min(end, until) - max(start, since)) for since, until in computing)
    # The parts' edges are rounded.
    return min(1.0, hidden / made) if made else 0.0


def is_named(event: dict[str, Any], prefix: str) -> bool:
    """Whether an event is what `record_function` named so."""
    # Of what record_function names on a CPU; a GPU's timeline repeats it under another category.
    return event.get("cat") == "user_annotation" and str(event.get("name", "")).startswith(prefix)
