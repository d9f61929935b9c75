"""What a run will cost: FLOPs, GPU-hours, dollars, and what the input side must deliver meanwhile.

    python -m benchmarks.roofline --model ViT-H-14 --tokens 36 --text-tokens 8 --samples 12.8e9 --gpu h100
    python -m benchmarks.roofline --published

Hours are FLOPs over (peak * MFU): nothing is measured here but the decode rates, which come from the loader benchmark's
JSON. `--published` holds the same arithmetic to the hours that CLIPA's authors give for their runs.
"""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from model.clip import gflops_per_pair
from model.presets import model_config
from pipeline.command import exit_code
from pipeline.table import format_table

from .command import write_json
from .published import RUNS, Run, Stage

PEAK_TFLOPS = {"a100": 312.0, "h100": 989.0, "h200": 989.0}
"""Dense bf16 of the SXM boards, from NVIDIA's data sheets."""
A100_DOLLARS = 1.58
"""A GPU-hour in CLIPA's cost tables (12,247 dollars for 7,776 hours)."""
RATES = Path(__file__).parent / "results" / "loader-photographs-all-cases.json"
SHRUNK_SIDES = (128, 256)


@dataclass(frozen=True)
class Plan:
    """Plan the cost of a run."""

    model: str = "ViT-H-14"
    """Which encoders, by name."""
    tokens: int = 36
    """Image tokens kept per image."""
    text_tokens: int = 8
    samples: float = 12.8e9
    """Image-text pairs of the first stage."""
    image_size: int | None = None
    """Side of the decoded square; by default what `resize` makes of the tokens, or the next larger grid."""
    then: tuple[str, ...] = ()
    """Further stages, each TOKENS/TEXT_TOKENS/SAMPLES or TOKENS/TEXT_TOKENS/SAMPLES/IMAGE_SIZE, as 179/32/512e6/224."""
    batch_size: int = 65_536
    """Global batch: the loss costs 4 * batch * embedding a pair."""
    gpu: Literal["a100", "h100", "h200"] = "a100"
    gpus: int = 8
    mfu: float | None = None
    """Model FLOPs utilisation, 0 to 1; by default the median that CLIPA's published hours imply."""
    dollars_per_hour: float | None = None
    """A GPU-hour; by default 1.58 for an A100, as in CLIPA's cost tables, and unknown for others."""
    pairs: float = 1e9
    """Pairs in the data set, for what its shards weigh."""
    decoder: Literal["turbo", "dali"] = "turbo"
    """Whose measured rate per core is taken."""
    rates: Path = RATES
    """The loader benchmark's JSON; its `environment` says on which machine the rates were measured."""
    published: bool = False
    """Instead: the arithmetic beside CLIPA's published runs."""
    json: Path | None = None
    """Write the figures here."""

    def __post_init__(self) -> None:
        for name in ("tokens", "text_tokens", "samples", "batch_size", "gpus", "pairs"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} is below 1")
        if self.mfu is not None and not 0 < self.mfu <= 1:
            raise ValueError(f"--mfu {self.mfu} is outside 0 to 1; published CLIP training lies at 0.11 to 0.39")
        if self.dollars_per_hour is not None and not self.dollars_per_hour >= 0:
            raise ValueError(f"--dollars-per-hour {self.dollars_per_hour} is below 0")


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the costs."""
    plan = tyro.cli(Plan, args=arguments, description=__doc__)
    write_json(plan.json, published(plan) if plan.published else planned(plan))


def training_gflops(model: str, stage: Stage, batch_size: int) -> float:
    """Returns GFLOPs of one pair and step: three times the forward pass, the loss's two products with it."""
    config = model_config(model)
    image, text = gflops_per_pair(config, stage.tokens, stage.text_tokens)
    return 3 * (image + text + 4 * batch_size * config.embed_dim / 1e9)


def implied_mfu(run: Run, batch_size: int = 65_536) -> float:
    """Returns the MFU at which a published run takes its published hours on A100s."""
    flops = sum(training_gflops(run.model, stage, batch_size) * 1e9 * stage.samples for stage in run.stages)
    return flops / (run.a100_hours * 3600 * PEAK_TFLOPS["a100"] * 1e12)


def published(plan: Plan) -> dict[str, Any]:
    """Prints and returns CLIPA's runs: what their hours imply, and what the others' MFU would have made of each."""
    implied = {run.name: implied_mfu(run, plan.batch_size) for run in RUNS}
    rows: list[dict[str, Any]] = []
    for run in RUNS:
        others = statistics.median(mfu for name, mfu in implied.items() if name != run.name)
        hours = run.a100_hours * implied[run.name] / others
        rows.append(
            {
                "run": run.name,
                "model": run.model,
                "top1": run.imagenet_top1,
                "a100_hours": run.a100_hours,
                "estimated": run.estimated,
                "implied_mfu": implied[run.name],
                "hours_at_others_mfu": hours,
                "ratio": hours / run.a100_hours,
            }
        )
    header = ("CLIPA's run", "ImageNet top-1", "A100 hours", "implied MFU", "hours at the others' MFU", "ratio")
    cells = [
        (
            row["run"],
            f"{row['top1']:.1f} %",
            f"{row['a100_hours']:,.0f}{' (est.)' if row['estimated'] else ''}",
            f"{row['implied_mfu']:.1%}",
            f"{row['hours_at_others_mfu']:,.0f}",
            f"{row['ratio']:.2f}",
        )
        for row in rows
    ]
    print(format_table(header, cells))
    print(f"implied MFU: {min(implied.values()):.1%} to {max(implied.values()):.1%}, no recomputation counted")
    return {"published": rows}


def planned(plan: Plan) -> dict[str, Any]:
    """Prints and returns what the plan's stages cost. Raises ValueError for a stage or rates that cannot be read."""
    patch = model_config(plan.model).image.patch
    first = Stage(plan.tokens, plan.text_tokens, plan.samples, plan.image_size or _image_size(plan.tokens, patch))
    stages = [first, *(_stage(text, patch) for text in plan.then)]
    rates, machine = measured_rates(plan.rates, plan.decoder)
    mfu = plan.mfu or statistics.median(implied_mfu(run) for run in RUNS)
    price = plan.dollars_per_hour if plan.dollars_per_hour is not None else {"a100": A100_DOLLARS}.get(plan.gpu)
    rows: list[dict[str, Any]] = []
    for stage in stages:
        gflops = training_gflops(plan.model, stage, plan.batch_size)
        rate = mfu * PEAK_TFLOPS[plan.gpu] * 1e3 / gflops * plan.gpus
        hours = stage.samples / rate / 3600 * plan.gpus
        rows.append(
            {
                **asdict(stage),
                "gflops_per_pair": gflops,
                "exaflops": gflops * stage.samples / 1e9,
                "gpu_hours": hours,
                "days": hours / plan.gpus / 24,
                "dollars": None if price is None else hours * price,
                "images_per_s": rate,
                "input": {name: _input(rates, name, stage, rate) for name in ("raw", *map(str, SHRUNK_SIDES))},
            }
        )
    _print(plan, rows, mfu, price, machine)
    return {"model": plan.model, "gpu": plan.gpu, "gpus": plan.gpus, "mfu": mfu, "machine": machine, "stages": rows}


Rates = dict[tuple[str, int], tuple[float, float]]
"""(shard set, image size) -> images a second of one core, bytes an image."""


def measured_rates(path: Path, decoder: str) -> tuple[Rates, str]:
    """Returns a decoder's measured rates by `resize`, and the machine. Raises ValueError where there are none."""
    try:
        table = json.loads(path.read_text())
        rates = {
            (str(row["data"]), int(row["image_size"])): (
                float(row["images_per_cpu_s"]),
                row["megabytes_per_cpu_s"] / row["images_per_cpu_s"] * 1e6,
            )
            for row in table["rows"]
            if row["decoder"] == decoder and row["image_reduction"] == "resize"
        }
        machine = str(table["environment"]["cpu"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--rates {path} is no JSON of `python -m benchmarks.pipeline` ({error!r})") from None
    if not rates:
        raise ValueError(f"--rates {path} has no row of {decoder} by resize")
    return rates, machine


def _input(rates: Rates, name: str, stage: Stage, images_per_s: float) -> dict[str, float] | None:
    """What one set of shards asks of the machine; None where it is too small for the stage, or was not measured."""
    # Shards of fewer pixels than the image would be enlarged.
    if name != "raw" and stage.image_size > int(name):
        return None
    sizes = sorted(size for data, size in rates if data == name)
    if not sizes:
        return None
    # The nearest measured size that is no smaller: its rate is no higher than the stage's own.
    size = next((size for size in sizes if size >= stage.image_size), sizes[-1])
    rate, image_bytes = rates[name, size]
    return {
        "measured_at_px": size,
        "images_per_core_s": rate,
        "cores": images_per_s / rate,
        "bytes_per_image": image_bytes,
        "network_gbit_s": images_per_s * image_bytes * 8 / 1e9,
    }


def _image_size(tokens: int, patch: int) -> int:
    return math.ceil(math.sqrt(tokens)) * patch


def _stage(text: str, patch: int) -> Stage:
    parts = text.split("/")
    try:
        if len(parts) not in (3, 4):
            raise ValueError
        tokens, text_tokens, samples = int(parts[0]), int(parts[1]), float(parts[2])
        stage = Stage(tokens, text_tokens, samples, int(parts[3]) if parts[3:] else _image_size(tokens, patch))
    except ValueError:
        raise ValueError(f"--then {text} is not TOKENS/TEXT_TOKENS/SAMPLES[/IMAGE_SIZE], as 179/32/512e6/224") from None
    if not min(stage.tokens, stage.text_tokens, stage.samples, stage.image_size) >= 1:
        raise ValueError(f"--then {text}: each number must be 1 or more")
    return stage


def _print(plan: Plan, rows: Sequence[dict[str, Any]], mfu: float, price: float | None, machine: str) -> None:
    assumed = "assumed" if plan.mfu else "the median of CLIPA's published runs"
    print(f"{plan.model} on {plan.gpus} {plan.gpu}, MFU {mfu:.1%} ({assumed}), global batch {plan.batch_size:,}")
    header = ("stage", "GFLOPs a pair", "exaFLOPs", "GPU-hours", "days", "dollars", "images/s to decode")
    total = [sum(row[name] for row in rows) for name in ("exaflops", "gpu_hours", "days")]
    cells = [
        (
            _name(row),
            f"{row['gflops_per_pair']:,.1f}",
            f"{row['exaflops']:,.0f}",
            f"{row['gpu_hours']:,.0f}",
            f"{row['days']:,.2f}",
            "-" if price is None else f"{row['dollars']:,.0f}",
            f"{row['images_per_s']:,.0f}",
        )
        for row in rows
    ]
    if len(rows) > 1:
        dollars = "-" if price is None else f"{total[1] * price:,.0f}"
        cells.append(("all", "", f"{total[0]:,.0f}", f"{total[1]:,.0f}", f"{total[2]:,.2f}", dollars, ""))
    print(format_table(header, cells))
    print(f"\ninput for all {plan.gpus} GPUs, {plan.decoder}, rates per core as measured on {machine}:")
    header = ("stage", "shards", "cores", "img/s a core", "network Gbit/s", f"TB of {plan.pairs:,.0f} pairs")
    lines: list[tuple[str, ...]] = []
    for row in rows:
        for name, need in row["input"].items():
            if need is None:
                continue
            lines.append(
                (
                    _name(row),
                    "raw" if name == "raw" else f"short side {name}",
                    f"{need['cores']:,.0f}",
                    f"{need['images_per_core_s']:,.0f} at {need['measured_at_px']} px",
                    f"{need['network_gbit_s']:,.1f}",
                    f"{need['bytes_per_image'] * plan.pairs / 1e12:,.1f}",
                )
            )
    print(format_table(header, lines))


def _name(row: dict[str, Any]) -> str:
    return f"{row['samples']:.3g} pairs, {row['tokens']} + {row['text_tokens']} tokens, {row['image_size']} px"


if __name__ == "__main__":
    sys.exit(main())
