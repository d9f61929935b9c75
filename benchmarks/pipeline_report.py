"""Rows of the loader benchmark in; tables and a plot out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Plot
from matplotlib.ticker import StrMethodFormatter

from evaluation.lettering import FONT
from pipeline.table import format_table

from .command import write_picture
from .loader_rounds import BARE_FULL, BARE_SCALED, OPEN_CLIP, STOCK, Figure, slowest_stage


@dataclass(frozen=True, kw_only=True)
class Row(Figure):
    """One contender's figures on one data set and case."""

    data: str
    """Name of the shard set."""
    decoder: str
    """turbo, dali; or the name of what is compared with."""
    case: str
    tokens: int
    image_reduction: str
    image_size: int
    threads: int
    workers: int
    """Processes that made the batches; 0: threads of one."""
    megabytes_per_cpu_s: float
    """JPEG bytes read, in units of 10^6."""
    gil_us: float | None
    """Time an image holds the GIL, in microseconds of wall time; None without gilknocker."""


_ORDER = ("turbo", "dali", OPEN_CLIP, STOCK, BARE_SCALED, BARE_FULL)
_COLOURS = {"turbo": "#1a7f37", "dali": "#2563a8", OPEN_CLIP: "#b3261e", STOCK: "#c2620a"}
_INK, _RULE = "#1f2933", "#c9d0d8"
_BEHIND = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def format_rows(rows: Sequence[Row]) -> str:
    """Returns one line a contender, data set and case, and how it stands to open_clip and to the limit."""
    first = rows[0].data
    # What storing fewer bytes buys as well: everything against open_clip on the first data set, case by case.
    base = {row.case: row.images_per_cpu_s for row in rows if row.decoder == OPEN_CLIP and row.data == first}
    whole_way = bool(base) and len({row.data for row in rows}) > 1
    header = ["data", "case", "decoder", "img per CPU s", "(range)", "x open_clip", "of limit", "img/s", "MB per CPU s"]
    header += ["GIL us", *([f"x open_clip on {first}"] if whole_way else [])]
    lines: list[list[str]] = []
    for row in _sorted(rows):
        cells = [
            row.data,
            row.case,
            row.decoder,
            f"{row.images_per_cpu_s:,.0f}",
            "{:,.0f}-{:,.0f}".format(*row.images_per_cpu_s_range),
            _number(row.over_open_clip, ".2f"),
            _number(row.of_limit, ".2f"),
            f"{row.images_per_s:,.0f}",
            f"{row.megabytes_per_cpu_s:.1f}",
            _number(row.gil_us, ".1f"),
        ]
        if whole_way:
            cells.append(_number(row.images_per_cpu_s / base[row.case] if row.case in base else None, ".1f"))
        lines.append(cells)
    return format_table(header, lines)


def format_stages(rows: Sequence[Row]) -> str:
    """Returns what an image costs in each stage of our loader, in microseconds of CPU time, and the dearest."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row.stage_us))
    header = ("data", "case", "decoder", *(f"{stage} us" for stage in stages), "sum us", "slowest")
    return format_table(
        header,
        [
            (
                row.data,
                row.case,
                row.decoder,
                *(_number(row.stage_us.get(stage), ".1f") for stage in stages),
                f"{sum(row.stage_us.values()):.0f}",
                slowest_stage(row.stage_us),
            )
            for row in _sorted(rows)
        ],
    )


def draw_plot(rows: Sequence[Row], out: Path) -> None:
    """Draws the rows as the PNG `out`: one panel a data set, bars by case, lines where bare decoding ends."""
    datasets = list(dict.fromkeys(row.data for row in rows))
    with matplotlib.rc_context({"font.family": FONT, "font.size": 10, "text.color": _INK, "axes.edgecolor": _RULE}):
        plot = Plot(figsize=(11, 0.6 + 2.9 * len(datasets)), facecolor="white", layout="constrained")
        FigureCanvasAgg(plot)
        for number, data in enumerate(datasets):
            axes = plot.add_subplot(len(datasets), 1, number + 1)
            _draw_panel(axes, data, [row for row in rows if row.data == data])
            if number == 0:
                plot.legend(*axes.get_legend_handles_labels(), loc="outside upper right", frameon=False, ncols=6)
    write_picture(plot, out)


def _draw_panel(axes: Axes, data: str, rows: Sequence[Row]) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    names = [name for name in _ORDER if name in _COLOURS and any(row.decoder == name for row in rows)]
    width = 0.8 / max(1, len(names))
    for number, name in enumerate(names):
        here = {row.case: row for row in rows if row.decoder == name}
        places = np.array([cases.index(case) for case in here]) + (number - (len(names) - 1) / 2) * width
        values = [row.images_per_cpu_s for row in here.values()]
        low, high = zip(*(row.images_per_cpu_s_range for row in here.values()), strict=True)
        spread = np.abs(np.array([low, high]) - values)
        bars = axes.bar(
            places, values, width * 0.92, color=_COLOURS[name], label=_label(name), yerr=spread, ecolor=_INK
        )
        axes.bar_label(bars, [f"{value:,.0f}" for value in values], fontsize=7.5, padding=2, bbox=_BEHIND)
    for name, style in ((BARE_SCALED, "-"), (BARE_FULL, ":")):
        limits = [(cases.index(row.case), row.images_per_cpu_s) for row in rows if row.decoder == name]
        for number, (place, limit) in enumerate(limits):
            label = name if number == 0 else None
            axes.plot([place - 0.45, place + 0.45], [limit, limit], style, color=_INK, linewidth=1.2, label=label)
    axes.set_xticks(range(len(cases)), cases)
    axes.set_title(f"{data}: images per second of CPU time", loc="left", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _label(name: str) -> str:
    return {STOCK: f"{STOCK} (224 px)", "dali": "ours, dali", "turbo": "ours, turbo"}.get(name, name)


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """By data set and case as they were measured, ours first."""
    places = list(dict.fromkeys((row.data, row.case) for row in rows))
    return sorted(rows, key=lambda row: (places.index((row.data, row.case)), _ORDER.index(row.decoder)))


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
