"""What runs beside what, drawn from a trace: `python -m benchmarks.overlap RUN/trace.json --out overlap.png`.

The trace is one of `train.py --profile` or of `python -m benchmarks.end_to_end --trace`. A line for the parts of the
steps, and one for each thread that makes batches.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import tyro
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.lettering import FONT
from pipeline.command import exit_code
from training.trace import MAKE, PART, WAIT, is_named, overlap

from .command import write_picture
from .step_report import PART_COLOURS

_INK, _RULE, _MAKING = "#1f2933", "#c9d0d8", "#d4870f"


@dataclass(frozen=True)
class Overlap:
    """Draw which batches were made under which steps."""

    trace: tyro.conf.Positional[Path]
    """A Chrome trace with the parts of steps."""
    out: Path
    """Write the PNG here."""
    steps: int = 4
    """The first so many of the trace."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Draws the picture, and prints what share of the batches' making the steps of the whole trace hid."""
    config = tyro.cli(Overlap, args=arguments, description=__doc__)
    if config.steps < 1:
        raise ValueError(f"--steps {config.steps} is below 1")
    parts, batches = events_of(config.trace)
    print(f"{overlap(batches, parts):.1%} of the making of batches fell into a step's computing")
    draw_overlap(parts, batches, config.out, steps=config.steps)
    print(f"picture: {config.out}")


def events_of(trace: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the parts of the trace's steps and the batches made, as Chrome's events, each in order of time.

    Raises ValueError where the file is no trace, or holds neither.
    """
    try:
        events: list[dict[str, Any]] = json.loads(trace.read_text())["traceEvents"]
        events.sort(key=lambda event: event.get("ts", 0))
    except OSError as error:
        raise ValueError(f"{trace} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{trace} is no Chrome trace; train.py --profile 20 writes one") from None
    parts = [event for event in events if event.get("cat") == PART]
    if not any(event["name"] == WAIT for event in parts):
        raise ValueError(f"{trace} holds no parts of steps; take one of train.py --profile or of end_to_end --trace")
    return parts, [event for event in events if is_named(event, MAKE)]


def draw_overlap(parts: Sequence[dict[str, Any]], batches: Sequence[dict[str, Any]], out: Path, *, steps: int) -> None:
    """Draws the first steps' parts over the batches of each thread, against milliseconds, as the PNG `out`."""
    begins = [event["ts"] for event in parts if event["name"] == WAIT]
    start = begins[0]
    end = begins[steps] if steps < len(begins) else parts[-1]["ts"] + parts[-1]["dur"]

    def bars(events: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
        clipped = [(max(e["ts"], start), min(e["ts"] + e["dur"], end)) for e in events]
        return [((since - start) / 1e3, (until - since) / 1e3) for since, until in clipped if until > since]

    threads = sorted({event["tid"] for event in batches})
    lines = ["steps", *(f"batches, thread {number}" for number in range(1, len(threads) + 1))]
    with matplotlib.rc_context({"font.family": FONT, "font.size": 10, "text.color": _INK, "axes.edgecolor": _RULE}):
        plot = Figure(figsize=(11, 1.4 + 0.7 * len(lines)), facecolor="white", layout="constrained")
        FigureCanvasAgg(plot)
        axes = plot.add_subplot()
        for part in dict.fromkeys(event["name"] for event in parts):
            own = bars([event for event in parts if event["name"] == part])
            colour = "#e3e7eb" if part == WAIT else PART_COLOURS.get(part, _INK)
            axes.broken_barh(own, (-0.35, 0.7), facecolors=colour, label=part.replace("_", " "))
        for line, thread in enumerate(threads, 1):
            own = bars([event for event in batches if event["tid"] == thread])
            # Edges in white: one batch follows the other without a gap where the loader is the slower.
            axes.broken_barh(own, (line - 0.35, 0.7), facecolors=_MAKING, edgecolors="white", linewidth=0.8)
        axes.set_yticks(range(len(lines)), lines)
        axes.invert_yaxis()
        axes.set_xlim(0, (end - start) / 1e3)
        axes.set_xlabel("ms")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    write_picture(plot, out)


if __name__ == "__main__":
    sys.exit(main())
