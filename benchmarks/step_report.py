"""Rows of the step benchmark in; tables and a plot out."""

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, PercentFormatter, StrMethodFormatter

from evaluation.lettering import FONT
from pipeline.table import format_table

from .command import write_picture


@dataclass(frozen=True)
class Spread:
    """Of the rounds."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One model, geometry and batch; medians over the rounds."""

    contender: str
    model: str
    tokens: int
    image_reduction: str
    image_size: int
    text_tokens: int
    batch_size: int
    device: str
    threads: int
    images_per_s: float
    images_per_s_range: tuple[float, float]
    images_per_cpu_s: float
    tokens_per_s: float
    """Of images and captions; the class token is not counted."""
    step_ms: float
    """A whole step, measured without marks."""
    step_ms_range: tuple[float, float]
    parts_ms: dict[str, float]
    parts_ms_range: dict[str, tuple[float, float]]
    parts_over_step: float
    """Sum of the parts to the whole step: how far the two agree."""
    model_gflop: float
    """Of a step, by the formula of model.clip.gflops_per_pair: what anyone's step of this model is counted as."""
    executed_gflop: float
    """Of the matrix products that our step does: fewer where one token is pooled; without attention's own."""
    gflop_per_s: float
    """model_gflop over the step's time."""
    executed_gflop_per_s: float
    gemm_gflop_per_s: float
    """Of the model's own shapes alone, in this process."""
    square_gflop_per_s: float
    mfu_of_gemm_rate: float
    """gflop_per_s to gemm_gflop_per_s, round by round."""
    executed_of_gemm_rate: float
    """The same of what is really computed: the share of the step in which products would take all the time."""
    executed_of_gemm_rate_by_cpu: float | None
    """By CPU time, which holds still on a busy machine; None on a GPU."""
    mfu_of_data_sheet: float | None
    """None where the device's peak is not known."""
    peak_memory_bytes: int


@dataclass(frozen=True, kw_only=True)
class PeerRow:
    """open_clip's step in the same rounds."""

    contender: str
    model: str
    tokens: int
    image_reduction: str
    text_tokens: int
    batch_size: int
    images_per_s: float
    images_per_s_range: tuple[float, float]
    images_per_cpu_s: float
    step_ms: float
    gflop_per_s: float
    square_gflop_per_s: float
    """In its own process, with its own torch; beside ours it shows whether both had the same machine."""
    ours_over_open_clip: Spread
    """images_per_s as a multiple, taken round by round."""
    ours_over_open_clip_by_cpu: Spread


@dataclass(frozen=True, kw_only=True)
class GivenRow:
    """The step with one thing changed, in the same rounds."""

    model: str
    tokens: int
    batch_size: int
    change: str
    images_per_s: float
    images_per_cpu_s: float
    speed: Spread
    """images_per_s to that of the step as it is, round by round."""
    speed_by_cpu: Spread


_INK, _RULE = "#1f2933", "#c9d0d8"
PART_COLOURS = {
    "copy": "#9aa5b1",
    "embed": "#7b8794",
    "image_forward": "#2563a8",
    "text_forward": "#6aa3d9",
    "forward": "#2563a8",
    "loss": "#c2620a",
    "backward": "#1a7f37",
    "gradient_reduction": "#8250df",
    "optimizer": "#b3261e",
}


def format_steps(rows: Sequence[StepRow], peers: Sequence[PeerRow]) -> str:
    """Returns one line a row: rates, and how they stand to the rate of products alone and to open_clip."""
    header = ["model", "tokens", "by", "text", "batch", "contender", "img/s", "(range)", "img per CPU s", "tokens/s"]
    header += ["step ms", "GFLOP/s", "GEMM GFLOP/s", "square", "MFU of GEMM", "computed of GEMM", "by CPU", "of sheet"]
    header += ["peak GiB", "ours x open_clip", "by CPU"]
    beside = {(peer.model, peer.tokens, peer.image_reduction): peer for peer in peers}
    lines: list[list[str]] = []
    for row in rows:
        peer = beside.get((row.model, row.tokens, row.image_reduction))
        lines.append(
            [
                *_start(row),
                f"{row.images_per_s:,.1f}",
                "{:,.1f}-{:,.1f}".format(*row.images_per_s_range),
                f"{row.images_per_cpu_s:,.2f}",
                f"{row.tokens_per_s:,.0f}",
                f"{row.step_ms:,.0f}",
                f"{row.gflop_per_s:,.0f}",
                f"{row.gemm_gflop_per_s:,.0f}",
                f"{row.square_gflop_per_s:,.0f}",
                f"{row.mfu_of_gemm_rate:.1%}",
                f"{row.executed_of_gemm_rate:.1%}",
                "-" if row.executed_of_gemm_rate_by_cpu is None else f"{row.executed_of_gemm_rate_by_cpu:.1%}",
                "-" if row.mfu_of_data_sheet is None else f"{row.mfu_of_data_sheet:.1%}",
                f"{row.peak_memory_bytes / 2**30:.2f}",
                "-" if peer is None else _ratio(peer.ours_over_open_clip),
                "-" if peer is None else _ratio(peer.ours_over_open_clip_by_cpu),
            ]
        )
        if peer is not None:
            lines.append(
                [
                    *_start(peer),
                    f"{peer.images_per_s:,.1f}",
                    "{:,.1f}-{:,.1f}".format(*peer.images_per_s_range),
                    f"{peer.images_per_cpu_s:,.2f}",
                    f"{peer.images_per_s * (peer.tokens + peer.text_tokens):,.0f}",
                    f"{peer.step_ms:,.0f}",
                    f"{peer.gflop_per_s:,.0f}",
                    "-",
                    f"{peer.square_gflop_per_s:,.0f}",
                    *["-"] * 7,
                ]
            )
    return format_table(header, lines)


def _start(row: StepRow | PeerRow) -> list[str]:
    return [row.model, str(row.tokens), row.image_reduction, str(row.text_tokens), str(row.batch_size), row.contender]


def _ratio(value: Spread) -> str:
    return f"{value.median:.3f} ({value.low:.3f}-{value.high:.3f})"


def format_parts(rows: Sequence[StepRow]) -> str:
    """Returns each row's parts in ms, and how their sum agrees with the whole step."""
    parts = list(dict.fromkeys(part for row in rows for part in row.parts_ms))
    header = ["model", "tokens", "by", "batch", *(f"{part} ms" for part in parts), "sum / step"]
    return format_table(
        header,
        [
            [
                row.model,
                str(row.tokens),
                row.image_reduction,
                str(row.batch_size),
                *(f"{row.parts_ms[part]:,.1f}" if part in row.parts_ms else "-" for part in parts),
                f"{row.parts_over_step:.3f}",
            ]
            for row in rows
        ],
    )


def format_given(rows: Sequence[GivenRow]) -> str:
    """Returns how fast the step is with each change, as a multiple of the step as it is."""
    header = ["model", "tokens", "batch", "change", "img/s", "img per CPU s", "speed", "speed by CPU"]
    return format_table(
        header,
        [
            [
                row.model,
                str(row.tokens),
                str(row.batch_size),
                row.change,
                f"{row.images_per_s:,.1f}",
                f"{row.images_per_cpu_s:,.2f}",
                _ratio(row.speed),
                _ratio(row.speed_by_cpu),
            ]
            for row in rows
        ],
    )


def draw_step_plot(rows: Sequence[StepRow], out: Path) -> None:
    """Draws the rows as the PNG `out`: images/s against tokens, a line a strategy; below, the parts' shares."""
    with matplotlib.rc_context({"font.family": FONT, "font.size": 10, "text.color": _INK, "axes.edgecolor": _RULE}):
        plot = Figure(figsize=(max(8, 1.2 + 0.7 * len(rows)), 8), facecolor="white", layout="constrained")
        FigureCanvasAgg(plot)
        _draw_rates(plot.add_subplot(2, 1, 1), rows)
        _draw_shares(plot.add_subplot(2, 1, 2), rows)
    write_picture(plot, out)


def _draw_rates(axes: Axes, rows: Sequence[StepRow]) -> None:
    lines = dict.fromkeys((row.model, row.image_reduction) for row in rows)
    for model, how in lines:
        own = sorted(
            (row for row in rows if (row.model, row.image_reduction) == (model, how)), key=lambda row: row.tokens
        )
        tokens, rates = [row.tokens for row in own], [row.images_per_s for row in own]
        low, high = zip(*(row.images_per_s_range for row in own), strict=True)
        errors = np.abs(np.array([low, high]) - rates)
        axes.errorbar(tokens, rates, errors, marker="o", capsize=2, label=f"{model}, {how}")
    finish_rates(axes, {row.tokens for row in rows}, "images/s of a training step, model alone")


def finish_rates(axes: Axes, tokens: Collection[int], title: str) -> None:
    """Makes of lines of images/s against image tokens a chart of two logarithmic axes."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks: list[int] = []
    for count in sorted(tokens):
        if not ticks or count > 1.1 * ticks[-1]:  # nearer, one number would stand upon the other
            ticks.append(count)
    axes.set_xticks(ticks, list(map(str, ticks)))
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.set_xlabel("image tokens")
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_shares(axes: Axes, rows: Sequence[StepRow]) -> None:
    names = [f"{row.tokens}\n{row.image_reduction}" for row in rows]
    sums = np.array([sum(row.parts_ms.values()) for row in rows])
    below = np.zeros(len(rows))
    for part, colour in PART_COLOURS.items():
        shares = np.array([row.parts_ms.get(part, 0.0) for row in rows]) / sums
        if shares.any():
            axes.bar(names, shares, 0.8, bottom=below, color=colour, label=part.replace("_", " "))
            below += shares
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_title("where the time of a step goes", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
