"""Rows of the end-to-end benchmark in; a table, a plot, and where the loader becomes the slower of the two out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from evaluation.lettering import FONT
from pipeline.table import format_table

from .command import write_picture
from .step_report import Spread, finish_rates


@dataclass(frozen=True, kw_only=True)
class EndToEndRow:
    """One model, decoder and geometry; medians over the rounds."""

    model: str
    data: str
    """Name of the shard set."""
    decoder: str
    tokens: int
    image_reduction: str
    text_tokens: int
    batch_size: int
    threads: int
    """That make batches."""
    model_threads: int
    device: str
    images_per_s: float
    """Of both together, as images_per_s_range."""
    images_per_s_range: tuple[float, float]
    loader_images_per_s: float
    """Of the loader alone, with its threads."""
    loader_images_per_s_range: tuple[float, float]
    model_images_per_s: float
    """Of the model alone, with its threads."""
    model_images_per_s_range: tuple[float, float]
    loader_images_per_cpu_s: float
    model_images_per_cpu_s: float
    bound_by: str
    """loader or model: the slower one alone."""
    over_lesser: Spread
    """images_per_s to the lesser of loader and model, round by round."""
    over_bound: Spread | None
    """The same, but to what the machine's cores allow for both together where that is less; None on a GPU."""
    data_wait_fraction: float
    parts_ms: dict[str, float]
    parts_ms_range: dict[str, tuple[float, float]]
    hidden_fraction: float | None
    """Share of the batches' making that fell into a step's computing; None without a trace."""


@dataclass(frozen=True)
class Crossing:
    """Where model and loader are equally fast."""

    model: str
    data: str
    decoder: str
    tokens: float | None
    """Interpolated; below it the run waits for data. None: one of them is the slower at every length measured."""
    always: str | None
    """Who is the slower then."""


def crossings(rows: Sequence[EndToEndRow]) -> list[Crossing]:
    """Returns for each model, data set and decoder the tokens at which it ceases to be bound by the loader.

    Between two lengths that were measured both rates are taken as powers of the number of tokens.
    """
    groups: dict[tuple[str, str, str], list[EndToEndRow]] = {}
    for row in sorted(rows, key=lambda row: row.tokens):
        groups.setdefault((row.model, row.data, row.decoder), []).append(row)
    found: list[Crossing] = []
    for (model, data, decoder), own in groups.items():
        # Above 0 where the model is the faster, and so the loader the bound.
        gaps = [(row.tokens, math.log(row.model_images_per_s / row.loader_images_per_s)) for row in own]
        tokens = next(
            (
                math.exp(math.log(n) + (math.log(m) - math.log(n)) * one / (one - other))
                for (n, one), (m, other) in pairwise(gaps)
                if one > 0 >= other
            ),
            None,
        )
        always = None if tokens is not None else ("loader" if gaps[-1][1] > 0 else "model")
        found.append(Crossing(model, data, decoder, tokens, always))
    return found


def format_crossings(found: Sequence[Crossing]) -> str:
    """Returns one sentence each."""
    lines: list[str] = []
    for each in found:
        who = f"{each.model} on {each.data}, {each.decoder}"
        if each.tokens is None:
            lines.append(f"{who}: bound by the {each.always} at every length measured")
        else:
            lines.append(f"{who}: below {each.tokens:.0f} tokens it is input-bound, from there on bound by the model")
    return "\n".join(lines)


def format_end_to_end(rows: Sequence[EndToEndRow]) -> str:
    """Returns two tables: rates and ratios, and the parts of a joint step in ms."""
    start = ["model", "data", "decoder", "tokens", "batch"]
    header = [*start, "threads", "loader img/s", "model img/s", "both img/s", "(range)", "bound by", "/ lesser"]
    header += ["(range)", "/ bound", "wait"]
    parts = list(dict.fromkeys(part for row in rows for part in row.parts_ms))
    names = [[row.model, row.data, row.decoder, str(row.tokens), str(row.batch_size)] for row in rows]
    rates = format_table(
        header,
        [
            [
                *name,
                f"{row.threads}+{row.model_threads}",
                f"{row.loader_images_per_s:,.1f}",
                f"{row.model_images_per_s:,.1f}",
                f"{row.images_per_s:,.1f}",
                "{:,.1f}-{:,.1f}".format(*row.images_per_s_range),
                row.bound_by,
                f"{row.over_lesser.median:.3f}",
                f"{row.over_lesser.low:.3f}-{row.over_lesser.high:.3f}",
                "-" if row.over_bound is None else f"{row.over_bound.median:.3f}",
                f"{row.data_wait_fraction:.1%}",
            ]
            for name, row in zip(names, rows, strict=True)
        ],
    )
    times = format_table(
        [*start, *(f"{part} ms" for part in parts)],
        [
            [*name, *(f"{row.parts_ms[part]:,.1f}" if part in row.parts_ms else "-" for part in parts)]
            for name, row in zip(names, rows, strict=True)
        ],
    )
    return f"{rates}\n\n{times}"


_INK, _RULE = "#1f2933", "#c9d0d8"
_DECODERS = {"turbo": "#1a7f37", "dali": "#2563a8"}


def draw_crossing(rows: Sequence[EndToEndRow], out: Path) -> None:
    """Draws rates against tokens as the PNG `out`: the model's, each decoder's, both together, and the crossings."""
    with matplotlib.rc_context({"font.family": FONT, "font.size": 10, "text.color": _INK, "axes.edgecolor": _RULE}):
        plot = Figure(figsize=(9, 5.5), facecolor="white", layout="constrained")
        FigureCanvasAgg(plot)
        axes = plot.add_subplot()
        for decoder in dict.fromkeys(row.decoder for row in rows):
            own = sorted((row for row in rows if row.decoder == decoder), key=lambda row: row.tokens)
            tokens, colour = [row.tokens for row in own], _DECODERS.get(decoder, _INK)
            axes.plot(
                tokens, [r.loader_images_per_s for r in own], "--", color=colour, label=f"loader alone, {decoder}"
            )
            axes.plot(tokens, [r.images_per_s for r in own], "o-", color=colour, label=f"both, {decoder}")
        models = sorted({(row.tokens, row.model_images_per_s) for row in rows if row.decoder == rows[0].decoder})
        axes.plot(*zip(*models, strict=True), ":", color=_INK, label=f"model alone, {rows[0].model}")
        for crossing in crossings(rows):
            if crossing.tokens is not None:
                colour = _DECODERS.get(crossing.decoder, _INK)
                axes.axvline(crossing.tokens, color=colour, linewidth=0.8)
                axes.text(
                    crossing.tokens,
                    0.01,
                    f" input-bound below {crossing.tokens:.0f}",
                    color=colour,
                    rotation=90,
                    ha="left",
                    va="bottom",
                    fontsize=8,
                    # Across in tokens, upwards in shares of the axis, whose limits are not known yet.
                    transform=axes.get_xaxis_transform(),
                )
        finish_rates(axes, {row.tokens for row in rows}, f"images/s on {rows[0].data}: loader against model")
    write_picture(plot, out)
