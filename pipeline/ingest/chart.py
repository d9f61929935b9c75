"""report.png: what became of the rows of a folder, drawn without a display."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from .fates import RETRIED, SUCCESS
from .progress import merged
from .statistics import Counts, Statistics
from .tables import duration, printable, size, top_places

DPI = 110
NUM_BARS = 12
NUM_POINTS = 60
_INK, _FAINT, _RULE = "#1f2933", "#6b7785", "#c9d0d8"
_BLUE, _GREEN, _ORANGE, _GREY = "#2563a8", "#1a7f37", "#c2620a", "#aab4be"
_SIDES = (0, 32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
_LENGTHS = (0, 10, 20, 30, 40, 50, 60, 80, 100, 150, 200, 300, 500, 1000)


def draw(found: Statistics, name: str, out: Path) -> None:
    """Draws a folder's statistics as the PNG `out`. name: of the folder, for the title."""
    # Imported here: matplotlib takes half a second, which a run needs only at its end.
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "axes.edgecolor": _RULE,
        "text.parse_math": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13, 12.5), facecolor="white")
        FigureCanvasAgg(figure)
        _title(figure, found, name)
        grid: Any = figure.add_gridspec(3, 2, left=0.16, right=0.94, top=0.875, bottom=0.055, hspace=0.5, wspace=0.42,
                                        height_ratios=(1.25, 1, 1))  # fmt: skip
        _fates(figure.add_subplot(grid[0, 0]), found)
        _places(figure.add_subplot(grid[0, 1]), found)
        _spread(figure.add_subplot(grid[1, 0]), "Short side, pixels", _SIDES, {
            "as it came": found.original.within(_SIDES), "as stored": found.stored.within(_SIDES)})  # fmt: skip
        _spread(figure.add_subplot(grid[1, 1]), "Caption length, characters", _LENGTHS, {
            "in the shards": found.captions.within(_LENGTHS)})  # fmt: skip
        _over_time(figure.add_subplot(grid[2, :]), found)
        with replacing(out) as file:
            figure.savefig(file, format="png", dpi=DPI)


def _title(figure: Any, found: Statistics, name: str) -> None:
    title = f"{printable(name)}: {found.num_kept:,} of {found.rows:,} rows kept ({found.num_kept / found.rows:.1%})"
    figure.text(0.03, 0.962, title, fontsize=18, fontweight="bold", va="center")
    parts = [f"{found.shards:,} shards, {size(found.shard_bytes)}", f"{size(found.downloaded_bytes)} read"]
    if found.time:
        parts.append(f"{duration(found.time[-1].end_s)} of working time")
    parts.append(f"{found.retryable:,} rows can be retried")
    figure.text(0.03, 0.932, "  ·  ".join(parts), fontsize=11, color=_FAINT, va="center")


def _fates(axes: Any, found: Statistics) -> None:
    _frame(axes, "What became of the rows", "x")
    common = found.fates.most_common()
    shown = common[:NUM_BARS]
    if rest := sum(number for _, number in common[NUM_BARS:]):
        shown.append((f"{len(common) - NUM_BARS} others", rest))
    colours = [_GREEN if fate == SUCCESS else _ORANGE if fate in RETRIED else _GREY for fate, _ in shown]
    numbers = [number for _, number in shown]
    axes.barh(range(len(shown)), numbers, color=colours, height=0.72)
    axes.set_yticks(range(len(shown)), [fate for fate, _ in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(numbers))
    for y, number in enumerate(numbers):
        axes.text(number, y, f" {number:,} ({number / found.rows:.1%})", va="center", fontsize=9)
    _key(axes, {"kept": _GREEN, "can be retried": _ORANGE, "left out": _GREY})


def _places(axes: Any, found: Statistics) -> None:
    _frame(axes, f"Rows by {found.place}", "x")
    shown = top_places(found, NUM_BARS)
    if not shown:
        _say_none(axes, "not recorded")
        return
    rows = np.array([number for _, number, _ in shown])
    kept = np.array([good for *_, good in shown])
    axes.barh(range(len(shown)), kept, color=_GREEN, height=0.72)
    axes.barh(range(len(shown)), rows - kept, left=kept, color=_GREY, height=0.72)
    axes.set_yticks(range(len(shown)), [_short(printable(place)) for place, *_ in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.22 * max(rows))
    for y, (number, good) in enumerate(zip(rows, kept, strict=True)):
        axes.text(number, y, f" {good / number:.0%} kept", va="center", fontsize=9)
    _key(axes, {"kept": _GREEN, "left out": _GREY})


def _short(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:10]}...{name[-11:]}"


def _spread(axes: Any, heading: str, edges: Sequence[int], counts: dict[str, Counts]) -> None:
    """Bars of how many lie between the edges; classes at either end that are empty are not drawn."""
    _frame(axes, heading, "y")
    filled = np.flatnonzero(sum(counts.values()))
    if not len(filled):
        _say_none(axes, "nothing was kept")
        return
    first, last = filled[0], filled[-1] + 1
    width = 0.84 / len(counts)
    for i, (label, colour) in enumerate(zip(counts, (_BLUE, _GREEN), strict=False)):
        at = np.arange(last - first) + (i - (len(counts) - 1) / 2) * width
        axes.bar(at, counts[label][first:last], width=width, color=colour)
    labels = [
        f"{low}+" if high is None else f"{low}-{high - 1}" for low, high in zip(edges, [*edges[1:], None], strict=True)
    ]
    axes.set_xticks(range(last - first), labels[first:last], rotation=35, ha="right", rotation_mode="anchor")
    axes.yaxis.set_major_locator(_whole_numbers())
    _key(axes, dict(zip(counts, (_BLUE, _GREEN), strict=False)))


def _over_time(axes: Any, found: Statistics) -> None:
    _frame(axes, "Over working time", "y")
    parts = merged(found.time, NUM_POINTS)
    if not parts:
        _say_none(axes, "not recorded")
        return
    unit_s, unit = (
        (3600, "hours") if parts[-1].end_s > 3 * 3600 else (60, "minutes") if parts[-1].end_s > 180 else (1, "seconds")
    )
    starts = np.array([part.end_s - part.seconds for part in parts]) / unit_s
    widths = np.array([part.seconds for part in parts]) / unit_s
    rates = [part.rows / max(part.seconds, 1e-9) for part in parts]
    axes.bar(starts, rates, widths, align="edge", color="#c8d9ec", edgecolor="white", linewidth=0.6)
    axes.set_ylabel("rows/s", color=_BLUE)
    axes.set_xlabel(f"{unit}, all runs end to end", color=_FAINT)
    axes.set_xlim(0, parts[-1].end_s / unit_s)
    axes.set_ylim(0, 1.15 * max(rates))
    share: Any = axes.twinx()
    share.spines[["top", "left"]].set_visible(False)
    share.tick_params(color=_RULE, labelcolor=_INK)
    kept = [100 * part.kept / max(part.rows, 1) for part in parts]
    share.plot(starts + widths / 2, kept, color=_GREEN, linewidth=2, marker="o", markersize=4, clip_on=False)
    share.set_ylim(0, 100)
    share.set_ylabel("kept, %", color=_GREEN)
    _key(axes, {"rows/s": "#c8d9ec", "share that is kept": _GREEN})


def _frame(axes: Any, heading: str, grid: str) -> None:
    axes.annotate(heading, (0, 1), (0, 24), "axes fraction", "offset points", fontsize=12.5, fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=_RULE, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(color=_RULE, labelcolor=_INK)
    (axes.xaxis if grid == "x" else axes.yaxis).set_major_formatter(_thousands())


def _thousands() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _key(axes: Any, colours: dict[str, str]) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=colour, label=label) for label, colour in colours.items()],
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.25, borderpad=0, ncols=len(colours),
        frameon=False, fontsize=9, handlelength=1.0, handletextpad=0.5, columnspacing=1.1,
    )  # fmt: skip


def _say_none(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_FAINT)
    axes.set(xticks=[], yticks=[])
