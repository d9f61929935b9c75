"""report.png: how a run went and what the model says of pictures it never saw. And the plain table that goes with it.

In: a run's metrics.jsonl and a `Sheet` of what validation found. Out: one PNG, drawn without a display.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, PercentFormatter

from .lettering import FONT, fitted

COLUMNS = 6
MAX_PICTURES = 48
DPI = 120

_INK, _FAINT, _RULE = "#1f2933", "#6b7785", "#c9d0d8"
_BLUE, _GREEN, _ORANGE, _RED = "#2563a8", "#1a7f37", "#c2620a", "#b3261e"
_GREEN_BAR, _GREY_BAR = "#c9ecd2", "#e9edf1"

# Inches. A cell is a picture with its names beneath.
_WIDTH, _MARGIN, _GAP = 13.0, 0.45, 0.22
_TITLE, _CHARTS, _HEADING = 1.0, 4.3, 0.5
_PICTURE = (_WIDTH - 2 * _MARGIN - (COLUMNS - 1) * _GAP) / COLUMNS
_LINE = 0.235


@dataclass(frozen=True)
class Sheet:
    """What zero-shot validation found: the numbers, and some held-out pictures with the model's best names."""

    zero_shot_top1: float
    """Share of the held-out pictures that the model names rightly."""
    num_images: int
    """Held-out pictures that zero_shot_top1 was measured on."""
    num_classes: int
    pictures: Sequence[npt.NDArray[np.uint8]]
    """uint8 [height, width, 3] each. The first MAX_PICTURES are drawn."""
    true_names: Sequence[str]
    """The class of each picture."""
    best_names: Sequence[Sequence[str]]
    """The model's best names for each picture, best first; equally many for each."""
    scores: Sequence[Sequence[float]]
    """The probabilities of best_names, 0 to 1."""
    pixel_baseline: float | None = None
    """Top-1 of the nearest training picture by pixels, where it was measured."""

    def __post_init__(self) -> None:
        lengths = {len(part) for part in (self.pictures, self.true_names, self.best_names, self.scores)}
        assert len(lengths) == 1, f"pictures, names and scores differ in number: {lengths}"
        for names, scores in zip(self.best_names, self.scores, strict=True):
            assert len(names) == len(scores) == len(self.best_names[0]), "as many scores as names, for each picture"

    @property
    def chance(self) -> float:
        """Top-1 of guessing."""
        return 1 / self.num_classes


def draw(run: Path, out: Path, sheet: Sheet) -> None:
    """Draws the run's loss and zero-shot curves and the sheet of pictures as the PNG `out`.

    Raises ValueError, in one line, when `run` holds no metrics.
    """
    metrics = read_metrics(run)
    figure = _figure(run.resolve().name, metrics, sheet)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.tmp")
    figure.savefig(unfinished, format="png", dpi=DPI)
    os.replace(unfinished, out)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Returns the objects of the run's metrics.jsonl. A last line without its end (a crash) does not count."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{file} is missing; give the folder that train.py --out named")
    *lines, _unfinished = file.read_bytes().split(b"\n")
    metrics = [json.loads(line) for line in lines if line.strip()]
    if not metrics:
        raise ValueError(f"{file} is empty; train for a few steps first")
    return metrics


def percent(share: float) -> str:
    """Returns a share as a percentage that keeps two digits of a small one: 41.3%, 4.5%, 0.054%."""
    value = 100 * share
    digits = min(4, 1 - math.floor(math.log10(value))) if 0 < value < 1 else 1
    return f"{value:.{digits}f}%"


def size_pixels(sheet: Sheet) -> tuple[int, int]:
    """Returns the report's width and height, in pixels."""
    return round(_WIDTH * DPI), round(_height(sheet) * DPI)


def _figure(run_name: str, metrics: Sequence[dict[str, Any]], sheet: Sheet) -> Figure:
    with matplotlib.rc_context({"font.family": FONT, "font.size": 11, "text.color": _INK, "axes.edgecolor": _RULE}):
        figure = Figure(figsize=(_WIDTH, _height(sheet)), facecolor="white")
        FigureCanvasAgg(figure)
        _draw_title(figure, run_name, sheet)
        left, right = _chart_axes(figure)
        _draw_loss(left, metrics)
        _draw_zero_shot(right, metrics, sheet)
        if len(sheet.pictures):
            _draw_sheet(figure, sheet)
        return figure


def _height(sheet: Sheet) -> float:
    num_rows = -(-min(len(sheet.pictures), MAX_PICTURES) // COLUMNS)
    sheet_height = _HEADING + num_rows * _cell_height(sheet) if num_rows else 0.0
    # A whole number of pixels.
    return round((_TITLE + _CHARTS + sheet_height + _MARGIN) * DPI) / DPI


def _cell_height(sheet: Sheet) -> float:
    num_lines = len(sheet.best_names[0]) + 1  # and one for the true name
    return _PICTURE + num_lines * _LINE + _GAP


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Returns axes placed in inches from the figure's top left corner."""
    whole_width, whole_height = figure.get_size_inches()
    bottom = whole_height - top - height
    return figure.add_axes((left / whole_width, bottom / whole_height, width / whole_width, height / whole_height))


def _say(axes: Axes, x: float, y: float, text: str, *, width: float = math.inf, **style: Any) -> None:
    """Writes text at (x, y) of the axes' own coordinates, as it stands (no $math$), cut to `width` inches."""
    points, bold = style.get("fontsize", 11.0), style.get("fontweight") == "bold"
    text = fitted(text, 72 * width, points, bold=bold)
    axes.text(x, y, text, transform=axes.transAxes, parse_math=False, **style)


def _draw_title(figure: Figure, run_name: str, sheet: Sheet) -> None:
    width = _WIDTH - 2 * _MARGIN
    axes = _axes(figure, _MARGIN, 0.25, width, _TITLE - 0.25)
    axes.set_axis_off()
    against = [f"chance {percent(sheet.chance)}{_times(sheet.zero_shot_top1, sheet.chance)}"]
    if (baseline := sheet.pixel_baseline) is not None:
        against.append(
            f"nearest training picture by pixels {percent(baseline)}{_times(sheet.zero_shot_top1, baseline)}"
        )
    title = f"{run_name}: {percent(sheet.zero_shot_top1)} zero-shot top-1"
    _say(axes, 0, 0.72, title, width=width, fontsize=19, fontweight="bold", va="center")
    on = f"{sheet.num_images:,} held-out pictures, {sheet.num_classes:,} classes"
    _say(axes, 0, 0.24, "  ·  ".join([on, *against]), width=width, fontsize=11.5, color=_FAINT, va="center")


def _times(value: float, reference: float) -> str:
    return f" (model: {_short(value / reference)} times that)" if reference > 0 else ""


def _short(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"


def _chart_axes(figure: Figure) -> tuple[Axes, Axes]:
    label, width = 0.55, (_WIDTH - 2 * _MARGIN - 0.5) / 2
    height = _CHARTS - 1.35
    lefts = (_MARGIN + label, _MARGIN + width + 0.5 + label)
    first, second = (_axes(figure, left, _TITLE + 0.6, width - label, height) for left in lefts)
    for axes in (first, second):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color=_RULE, linewidth=0.6, alpha=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(labelsize=10.5, color=_RULE, labelcolor=_INK)
        axes.set_xlabel("samples seen", color=_FAINT)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    return first, second


def _series(metrics: Sequence[dict[str, Any]], name: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns (samples seen, value) where the metrics have `name` and it is a finite number."""
    pairs = [(entry["samples_seen"], entry[name]) for entry in metrics if entry.get(name) is not None]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return points[:, 0], points[:, 1]


def _draw_loss(axes: Axes, metrics: Sequence[dict[str, Any]]) -> None:
    seen, loss = _series(metrics, "loss")
    _heading(axes, "Training loss")
    if len(loss) >= 40:
        axes.plot(seen, loss, color=_BLUE, alpha=0.25, linewidth=0.9, label="each logged step")
        axes.plot(seen, _running_mean(loss, len(loss) // 20), color=_BLUE, linewidth=2.2, label="running mean")
        _legend(axes, 2)
    else:
        axes.plot(seen, loss, color=_BLUE, linewidth=2.2, marker="o" if len(loss) < 8 else None)
    axes.set_xlim(*_from_zero(seen))


def _draw_zero_shot(axes: Axes, metrics: Sequence[dict[str, Any]], sheet: Sheet) -> None:
    seen, top1 = _series(metrics, "zero_shot_top1")
    end = max(entry["samples_seen"] for entry in metrics)
    _heading(axes, "Zero-shot top-1")
    if len(top1):
        few = "o" if len(top1) <= 40 else None
        axes.plot(seen, top1, color=_BLUE, linewidth=2.2, marker=few, markersize=4.5, label="in training")
    final = f"final {percent(sheet.zero_shot_top1)}"
    axes.plot([end], [sheet.zero_shot_top1], color=_GREEN, marker="o", markersize=9, linestyle="", label=final)
    axes.axhline(sheet.chance, color=_FAINT, linestyle=":", linewidth=1.8, label=f"chance {percent(sheet.chance)}")
    levels = [sheet.zero_shot_top1, sheet.chance, *top1]
    if (baseline := sheet.pixel_baseline) is not None:
        axes.axhline(baseline, color=_ORANGE, linestyle="--", linewidth=1.8, label=f"by pixels {percent(baseline)}")
        levels.append(baseline)
    _legend(axes, 4)
    axes.set_xlim(*_from_zero(np.array([end])))
    top = min(1.02, 1.1 * max(levels))
    axes.set_ylim(-0.015 * top, top)  # chance is often near nothing: keep its line off the edge
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if max(levels) > 0.04 else None))


def _heading(axes: Axes, text: str) -> None:
    axes.annotate(text, (0, 1), (0, 27), "axes fraction", "offset points", fontsize=13, fontweight="bold")


def _legend(axes: Axes, columns: int) -> None:
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), borderaxespad=0.25, borderpad=0, ncols=columns, frameon=False,
        fontsize=10, handlelength=1.5, handletextpad=0.5, columnspacing=1.1,
    )  # fmt: skip


def _from_zero(seen: npt.NDArray[np.float64]) -> tuple[float, float]:
    return 0.0, 1.03 * max(1.0, float(seen.max(initial=0)))


def _running_mean(values: npt.NDArray[np.float64], window: int) -> npt.NDArray[np.float64]:
    """Returns the mean over up to 2 * window + 1 values around each; fewer at the ends."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    first, last = np.maximum(at - window, 0), np.minimum(at + window + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def _draw_sheet(figure: Figure, sheet: Sheet) -> None:
    top = _TITLE + _CHARTS
    num_drawn = min(len(sheet.pictures), MAX_PICTURES)
    num_right = sum(sheet.best_names[i][0] == sheet.true_names[i] for i in range(num_drawn))
    heading = _axes(figure, _MARGIN, top, _WIDTH - 2 * _MARGIN, _HEADING)
    heading.set_axis_off()
    title = f"Held-out pictures and the model's best names: {num_right} of these {num_drawn} right"
    _say(heading, 0, 0.62, title, fontsize=13, fontweight="bold", va="center")
    for i in range(num_drawn):
        row, column = divmod(i, COLUMNS)
        left = _MARGIN + column * (_PICTURE + _GAP)
        _draw_cell(figure, left, top + _HEADING + row * _cell_height(sheet), sheet, i)


def _draw_cell(figure: Figure, left: float, top: float, sheet: Sheet, i: int) -> None:
    true_name, names = sheet.true_names[i], sheet.best_names[i]
    right = names[0] == true_name
    picture = _axes(figure, left, top, _PICTURE, _PICTURE)
    picture.imshow(sheet.pictures[i], interpolation="lanczos")
    picture.set(xticks=[], yticks=[])
    picture.spines[:].set(color=_GREEN if right else _RULE, linewidth=2.5 if right else 1.0)
    for line, (name, score) in enumerate(zip(names, sheet.scores[i], strict=True)):
        axes = _axes(figure, left, top + _PICTURE + 0.06 + line * _LINE, _PICTURE, _LINE)
        _draw_name(axes, name, score, name == true_name)
    if not right:
        axes = _axes(figure, left, top + _PICTURE + 0.06 + len(names) * _LINE, _PICTURE, _LINE)
        axes.set_axis_off()
        _say(axes, 0.02, 0.45, f"is: {true_name}", width=0.96 * _PICTURE, fontsize=9.5, color=_RED, va="center")


def _draw_name(axes: Axes, name: str, score: float, right: bool) -> None:
    """Writes a name over a bar as long as its probability; the right one green and with a check mark."""
    axes.set_axis_off()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    share = min(max(score, 0.0), 1.0) if math.isfinite(score) else 0.0
    axes.add_patch(Rectangle((0, 0.06), share, 0.88, color=_GREEN_BAR if right else _GREY_BAR, linewidth=0))
    color = _GREEN if right else _INK
    number = f"{share:.0%}" if share >= 0.01 else "<1%"
    text = f"✓ {name}" if right else name
    _say(axes, 0.02, 0.45, text, width=0.78 * _PICTURE, fontsize=9.5, color=color, va="center")
    _say(axes, 0.99, 0.45, number, fontsize=9, color=color, va="center", ha="right")
