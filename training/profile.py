"""`train.py --profile N`: how long each part of N steps of a real run takes, and a trace of a few steps more.

The run is the same as without: parts are told apart by marks between them (marks.py), which ask no device anything, and
the steps that are traced, which costs time, come after those that are timed. Rank 0 does it, for itself.
"""

import json
import statistics
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from model.clip import CLIP
from pipeline.files import write_text
from pipeline.table import format_table

from .distributed import World
from .fields import Config
from .marks import FORWARD, Marks, marked
from .rates import Rates

PROFILE, TRACE = "profile.json", "trace.json"
WARM_UP_STEPS = 5
"""Of this start, before the first step that is timed: memory that was never touched, and a queue of ready batches."""
TRACED_STEPS = 3


class Profile:
    """Marks in the loop: `begin` where a step begins, `end` where a part of it ends; they do nothing elsewhere."""

    def __init__(self, config: Config, model: CLIP, rates: Rates, world: World, steps_done: int) -> None:
        """steps_done: by the run, before this start. Fewer steps are timed where fewer are left."""
        self._config, self._model, self._rates, self._world = config, model, rates, world
        wanted, left = config.profile if world.is_first else 0, config.total_steps - steps_done
        traced = min(TRACED_STEPS, wanted, left - 1)
        timed = min(wanted, left - traced)
        self._first = steps_done + 1 + min(WARM_UP_STEPS, left - timed - traced)
        self._first_traced = self._first + timed
        self._end = self._first_traced + traced
        device = torch.device(config.device)
        self._timed, self._traced = Marks(device), Marks(device)
        self._marks: Marks | None = None
        """Of the step that is under way; None where it is not profiled."""
        self._encoding = False
        """Whether what the model encodes is a step's batch; evaluation's is not."""
        self._hooks, self._step_span = ExitStack(), ExitStack()
        self._profiler: Any = None

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._finish()
        else:
            self._stop()

    def begin(self, step: int) -> None:
        """Says that a step of the run (from 1) begins. The first one after those that are profiled writes the files."""
        if not self._first <= step <= self._end or self._first == self._end:
            return
        if step == self._end:
            before = time.perf_counter()
            self._finish()
            self._rates.leave_out(time.perf_counter() - before)
            return
        if step == self._first:
            self._hooks.enter_context(marked(self._model, self._forward_part, compiled=self._config.compile))
            self._marks = self._timed
        if step == self._first_traced:
            # Here: a run that is not profiled does without.
            from .trace import profiler

            self._marks, self._profiler = self._traced, profiler()
            self._profiler.start()
        if self._profiler is not None:
            from .trace import STEP

            self._step_span.close()
            self._step_span.enter_context(torch.profiler.record_function(f"{STEP}{step}"))
        if self._marks is not None:
            self._marks.begin()

    def end(self, part: str) -> None:
        """Says that a part of the step ends here, and what follows begins."""
        if self._marks is not None:
            self._marks.end(part)

    @contextmanager
    def encoding(self) -> Generator[None]:
        """What the model encodes inside is of a step, and tells its own parts."""
        self._encoding = True
        try:
            yield
        finally:
            self._encoding = False
        if self._config.compile:
            self.end(FORWARD)

    def _forward_part(self, part: str) -> None:
        if self._encoding:
            self.end(part)

    def _stop(self) -> None:
        self._step_span.close()
        if self._profiler is not None:
            self._profiler.stop()
        self._hooks.close()
        self._marks = None

    def _finish(self) -> None:
        """Writes and prints what was profiled, once."""
        if self._marks is None:
            return
        self._stop()
        (self._config.run_folder / TRACE).unlink(missing_ok=True)  # of an older profile
        steps, run = self._timed.milliseconds(), self._config.run_folder
        found = summary(steps, self._config, self._rates, self._world)
        first, last = self._first, self._first + len(steps) - 1
        found |= {"first_step": first, "last_step": last}
        fewer = "" if len(steps) == self._config.profile else f" (fewer than the {self._config.profile} of --profile)"
        lines = [f"profile   steps {first:,} to {last:,}{fewer}: {run / PROFILE}"]
        if self._config.device == "cuda":
            found["host_parts_ms"] = _medians(_by_part(self._timed.host_milliseconds()))
        if self._profiler is not None:
            from .trace import write_trace

            try:
                hidden = write_trace(self._profiler, self._traced.seconds(), run / TRACE)
            # Whatever the profiler stumbles over must not end the run that it watches.
            except Exception as error:
                lines.append(f"warning: no trace could be written: {error}")
            else:
                # The batches of worker processes are on no line of this one's trace.
                found["hidden_fraction"] = None if self._config.workers else hidden
                count = len(self._traced.seconds())
                lines.append(f"trace     of {count} steps more, for ui.perfetto.dev: {run / TRACE}")
        # As benchmarks write theirs: benchmarks.compare sets two profiles side by side.
        result = {"benchmark": "profile", "environment": _environment(self._config), "rows": [found]}
        write_text(run / PROFILE, json.dumps(result, indent=1) + "\n")
        print("\n".join([*lines, table(found)]), flush=True)


def summary(steps: Sequence[Mapping[str, float]], config: Config, rates: Rates, world: World) -> dict[str, Any]:
    """Returns what profile.json says of steps. steps: of each, the milliseconds of its parts."""
    parts = _by_part(steps)
    wholes = [sum(step.values()) for step in steps]
    total = sum(wholes)
    return {
        **{name: getattr(config, name) for name in ("model", "tokens", "text_tokens", "batch_size", "accumulate")},
        **{name: getattr(config, name) for name in ("device", "precision", "compile", "decoder", "threads", "workers")},
        "world_size": world.size,
        **rates.of(len(steps), total / 1e3),
        "data_wait_fraction": sum(parts["data_wait"]) / total,
        "step_ms": statistics.median(wholes),
        "step_ms_range": (min(wholes), max(wholes)),
        "parts_ms": _medians(parts),
        "parts_ms_range": {name: (min(values), max(values)) for name, values in parts.items()},
        "shares": {name: sum(values) / total for name, values in parts.items()},
        "steps_ms": [dict(step) for step in steps],
    }


def _environment(config: Config) -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name() if config.device == "cuda" else None,
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
    }


def table(found: Mapping[str, Any]) -> str:
    """Returns profile.json's values for a person."""
    rows = [
        [name, f"{median:.2f}", *(f"{edge:.2f}" for edge in found["parts_ms_range"][name]), f"{share:.1%}"]
        for (name, median), share in zip(found["parts_ms"].items(), found["shares"].values(), strict=True)
    ]
    rows.append(["step", f"{found['step_ms']:.2f}", *(f"{edge:.2f}" for edge in found["step_ms_range"]), "100.0%"])
    mfu = "" if found["mfu"] is None else f", mfu {found['mfu']:.0%}"
    hidden = found.get("hidden_fraction")
    beside = "" if hidden is None else f"; while traced, {hidden:.0%} of the making of batches went on beside computing"
    rates = f"{found['images_per_s']:,.0f} img/s, {found['tokens_per_s']:,.0f} tokens/s{mfu}{beside}"
    return f"{format_table(['part', 'median ms', 'lowest', 'highest', 'share'], rows)}\n{rates}"


def _by_part(steps: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Returns each part's milliseconds in all steps; 0 in those that do without it."""
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: [step.get(name, 0.0) for step in steps] for name in names}


def _medians(parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(values) for name, values in parts.items()}
