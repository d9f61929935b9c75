"""Measurements of a sweep in; tables and plots out, beside the curves of CLIPA's paper."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullLocator, StrMethodFormatter

from evaluation.lettering import FONT
from pipeline.table import format_table

from . import paper
from .command import write_picture
from .scaling_fit import Measurement, drops, fit, mean_and_range, needed

_INK, _RULE = "#1f2933", "#c9d0d8"
_COLOURS = ("#2563a8", "#c2620a", "#1a7f37", "#b3261e", "#6d4aa8", "#4a5560")
_MARKS = {"resize": "o", "random": "s", "block": "D", "grid": "^"}


def format_points(found: Sequence[Measurement], full_tokens: int) -> str:
    """Returns a line for each model, reduction and length: accuracy and drop over seeds, and what it took."""
    all_drops = drops(found, full_tokens)
    groups: dict[tuple[str, str, int, int], list[Measurement]] = {}
    for one in found:
        groups.setdefault((one.model, one.image_reduction, one.tokens, one.text_tokens), []).append(one)
    lines: list[tuple[str, ...]] = []
    for (model, reduction, tokens, text_tokens), ones in sorted(groups.items(), key=lambda item: _place(item[1][0])):
        fell = all_drops.get((model, reduction, text_tokens), {}).get(tokens, {})
        lines.append(
            (
                model,
                reduction,
                str(tokens),
                str(text_tokens),
                str(len(ones)),
                _spread([one.accuracy for one in ones]),
                _spread(list(fell.values())),
                f"{sum(one.gflops for one in ones) / len(ones) / 1000:,.1f}",
                _mean([one.cpu_s for one in ones]),
                _mean([one.wall_s for one in ones]),
            )
        )
    header = ("model", "reduction", "tokens", "text", "seeds", "accuracy %", "drop", "TFLOP", "CPU s", "wall s")
    return format_table(header, lines)


def format_needed(found: Sequence[Measurement], full_tokens: int, within: Sequence[float]) -> str:
    """Returns the fitted tokens that each model needs to stay within some points; the paper's models beneath."""
    lines: list[tuple[str, ...]] = []
    for (model, reduction, text_tokens), lengths in drops(found, full_tokens).items():
        cells = [str(needed(lengths, full_tokens, points)) for points in within]
        # A reason is said once.
        if len(set(cells)) == 1 and cells[0].startswith("no fit"):
            cells = [cells[0], *("-" for _ in cells[1:])]
        lines.append((model, reduction, str(text_tokens), str(full_tokens), *cells))
    for model in paper.MODELS:
        for reduction in _MARKS:
            curve = fit(paper.drops(model, reduction), paper.FULL_TOKENS)
            if curve is not None:
                cells = [_tokens(curve.tokens_within(points), curve.shortest) for points in within]
                lines.append((f"CLIPA {model}", reduction, "32", str(paper.FULL_TOKENS), *cells))
    return format_table(("model", "reduction", "text", "of", *(f"within {x:g} points" for x in within)), lines)


def draw(found: Sequence[Measurement], full_tokens: int, name: str, out: Path) -> list[Path]:
    """Draws the PNGs of one shard set under `out`, and returns them. Strategies are drawn where there are several."""
    written = [
        _draw(out / f"drop-{name}.png", [(_own_drops, name), (_paper_drops, "")], found, full_tokens),
        _draw(out / f"compute-{name}.png", [(_own_compute, name), (_paper_compute, "")], found, full_tokens),
    ]
    if len({one.image_reduction for one in found}) > 1:
        panels = [(_own_strategies, name), (_paper_strategies, "")]
        written.append(_draw(out / f"strategies-{name}.png", panels, found, full_tokens))
    return written


def _draw(path: Path, panels, found: Sequence[Measurement], full_tokens: int) -> Path:  # pyright: ignore
    with matplotlib.rc_context({"font.family": FONT, "font.size": 10, "text.color": _INK, "axes.edgecolor": _RULE}):
        figure = Figure(figsize=(11, 4.2), facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        for number, (panel, name) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), number + 1)
            panel(axes, found, full_tokens, name)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color=_RULE, linewidth=0.5, alpha=0.6)
            axes.set_axisbelow(True)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(frameon=False, fontsize=8.5)
        write_picture(figure, path)
    return path


def _own_drops(axes: Axes, found: Sequence[Measurement], full_tokens: int, name: str) -> None:
    everything = drops(found, full_tokens)
    models = _models(found)
    for (model, reduction, text_tokens), lengths in everything.items():
        colour = _COLOURS[models.index(model) % len(_COLOURS)]
        label = model if reduction == "resize" else f"{model}, {reduction}"
        if len({one.text_tokens for one in found}) > 1:
            label += f", T {text_tokens}"
        for tokens, of_seed in lengths.items():
            axes.plot(
                [tokens] * len(of_seed), list(of_seed.values()), _MARKS[reduction], color=colour, alpha=0.45, ms=4
            )
        means = [sum(of_seed.values()) / len(of_seed) for of_seed in lengths.values()]
        style = "-" if reduction == "resize" else ":"
        axes.plot([*lengths, full_tokens], [*means, 0], style + _MARKS[reduction], color=colour, label=label)
    _drop_axes(axes, sorted({one.tokens for one in found} | {full_tokens}))
    axes.set_title(f"our runs, on {name}", loc="left", fontsize=11)
    if not everything:
        axes.text(0.5, 0.5, "no shorter length beside a full one yet", ha="center", transform=axes.transAxes)


def _paper_drops(axes: Axes, _found: Sequence[Measurement], _full: int, _name: str) -> None:
    for model, colour in zip(paper.MODELS, _COLOURS, strict=False):
        lengths = dict(sorted(paper.drops(model).items()))
        axes.plot([*lengths, paper.FULL_TOKENS], [*lengths.values(), 0], "-o", color=colour, label=f"{model}, resize")
    _drop_axes(axes, [16, 36, 49, 100, 196])
    axes.set_title("CLIPA's paper: ImageNet top-1, single runs", loc="left", fontsize=11)


def _own_compute(axes: Axes, found: Sequence[Measurement], _full: int, name: str) -> None:
    for model, colour in zip(_models(found), _COLOURS, strict=False):
        groups: dict[int, list[Measurement]] = {}
        for one in found:
            if one.model == model and one.image_reduction == "resize" and one.cpu_s is not None:
                groups.setdefault(one.tokens, []).append(one)
        line: list[tuple[float, float]] = []
        for tokens, ones in sorted(groups.items()):
            hours = [one.cpu_s / 3600 for one in ones if one.cpu_s is not None]
            axes.plot(hours, [one.accuracy for one in ones], "o", color=colour, alpha=0.45, ms=4)
            line.append((sum(hours) / len(hours), sum(one.accuracy for one in ones) / len(ones)))
            axes.annotate(str(tokens), line[-1], textcoords="offset points", xytext=(4, -11), fontsize=8)
        if line:
            axes.plot(*zip(*line, strict=True), "-o", color=colour, label=model)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("CPU hours measured, fine-tune included (numbers: tokens)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(f"our runs, on {name}", loc="left", fontsize=11)


def _paper_compute(axes: Axes, _found: Sequence[Measurement], _full: int, _name: str) -> None:
    for (model, line), colour in zip(paper.COMPUTE.items(), _COLOURS, strict=False):
        axes.plot(*zip(*line, strict=True), "-o", color=colour, label=model)
    axes.set_xscale("log")
    axes.set_xlabel("training compute, 1e11 GFLOPs x samples (read off figure 8)")
    axes.set_ylabel("ImageNet top-1, %")
    axes.set_title("CLIPA's paper", loc="left", fontsize=11)


def _own_strategies(axes: Axes, found: Sequence[Measurement], full_tokens: int, name: str) -> None:
    masked = {(one.model, one.tokens) for one in found if one.image_reduction != "resize"}
    bars: dict[str, dict[str, list[float]]] = {}
    for (model, reduction, _), lengths in drops(found, full_tokens).items():
        for tokens, of_seed in lengths.items():
            if (model, tokens) in masked:
                bars.setdefault(f"{model}\n{tokens} tokens", {}).setdefault(reduction, []).extend(of_seed.values())
    _bars(axes, bars)
    axes.set_title(f"our runs, on {name}", loc="left", fontsize=11)


def _paper_strategies(axes: Axes, _found: Sequence[Measurement], _full: int, _name: str) -> None:
    bars: dict[str, dict[str, list[float]]] = {}
    for tokens in (49, 16):
        for model in paper.MODELS:
            found = {name: paper.drops(model, name).get(tokens) for name in _MARKS}
            bars[f"{model}\n{tokens}"] = {name: [drop] for name, drop in found.items() if drop is not None}
    _bars(axes, bars)
    axes.set_title("CLIPA's paper, 49 and 16 of 196 tokens", loc="left", fontsize=11)


def _bars(axes: Axes, bars: dict[str, dict[str, list[float]]]) -> None:
    reductions = [name for name in _MARKS if any(name in group for group in bars.values())]
    width = 0.8 / max(1, len(reductions))
    for number, (reduction, colour) in enumerate(zip(reductions, _COLOURS, strict=False)):
        shift = (number - (len(reductions) - 1) / 2) * width
        here = [(i + shift, group[reduction]) for i, group in enumerate(bars.values()) if reduction in group]
        heights = [sum(values) / len(values) for _, values in here]
        axes.bar([x for x, _ in here], heights, width * 0.92, color=colour, label=reduction)
        for x, values in here:
            axes.plot([x] * len(values), values, "o", color=_INK, ms=3)
    axes.set_xticks(range(len(bars)), list(bars))
    axes.set_ylabel("points below the full length")


def _drop_axes(axes: Axes, ticks: Sequence[int]) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.set_xlabel("image tokens in training")
    axes.set_ylabel("points below the full length")
    axes.invert_yaxis()


def _models(found: Sequence[Measurement]) -> list[str]:
    """Returns the models, the smallest first: by what their dearest point takes."""
    cost = {one.model: max(other.gflops for other in found if other.model == one.model) for one in found}
    return sorted(cost, key=lambda model: cost[model])


def _place(one: Measurement) -> tuple[float, str, int, int]:
    digits = "".join(character if character.isdigit() else " " for character in one.model).split()
    return (float(digits[0]) if digits else 0, one.image_reduction, one.tokens, one.text_tokens)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle, low, high = mean_and_range(values)
    return f"{middle:.1f}" + (f" ({low:.1f} to {high:.1f})" if len(values) > 1 else "")


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):,.0f}" if known else "-"


def _tokens(value: float, shortest: int) -> str:
    return f"{shortest} or fewer" if value <= shortest else f"{value:.0f}"
