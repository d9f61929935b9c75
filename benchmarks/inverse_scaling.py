"""CLIPA's law on your own data: `python -m benchmarks.inverse_scaling benchmarks/sweeps/emoji.toml --out DIR`.

Trains each point of a sweep (models, tokens, image reductions, text tokens, seeds) with train.py, fine-tunes it at full
tokens, measures it with validate.py; a point after the other, each a line of DIR/results.jsonl when it is finished. The
same command goes on after an interruption of any kind. Then: how far each model falls behind its own full length, what
that bought in measured compute, and the tokens that it needs to stay within some points, beside CLIPA's curves.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from pipeline.files import only_writer, write_text
from pipeline.table import format_table
from training.config import resolved_device
from training.signals import INTERRUPTED

from . import scaling_probe, scaling_queue, scaling_report
from .scaling_fit import Measurement
from .scaling_sweep import Sweep, load

_SWEEPS = Path(__file__).parent / "sweeps"


@dataclass(frozen=True)
class InverseScaling:
    """Run a sweep, or go on with it; then draw its curves."""

    sweep: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SWEEP.toml")]
    """A sweep file, or the name of one in benchmarks/sweeps."""
    out: Path
    """Folder of the results."""
    dry_run: bool = False
    """Print the points, their FLOPs and an estimate of the time, and train nothing."""
    report: bool = False
    """Train nothing: table and plots of what is finished."""
    within: tuple[float, ...] = (1.0, 2.0, 5.0)
    """Points below the full length for which the needed tokens are fitted."""
    device: Literal["auto", "cuda", "cpu"] = "auto"

    def __post_init__(self) -> None:
        if not self.within or min(self.within) <= 0:
            raise ValueError(f"--within {' '.join(map(str, self.within))}: give points above 0, such as 1 2 5")


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for what the user can mend, 130 where it was interrupted."""
    try:
        asked = tyro.cli(InverseScaling, args=arguments, description=__doc__)
        path = asked.sweep if asked.sweep.exists() else _SWEEPS / asked.sweep.with_suffix(".toml").name
        sweep = load(path if path.exists() else asked.sweep)
        if asked.dry_run:
            dry_run(sweep, asked)
            return 0
        with only_writer(asked.out):
            scaling_queue.refuse_other_sweep(sweep, asked.out)
            if not asked.report:
                scaling_queue.run_all(sweep, asked.out, asked.device, lambda line: print(line, flush=True))
            report(sweep, asked)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, scaling_queue.Interrupted):
        print("interrupted; the same command goes on", file=sys.stderr)
        return INTERRUPTED
    return 0


def dry_run(sweep: Sweep, asked: InverseScaling) -> None:
    """Prints the points in the order of the queue, and what is left to do."""
    resolved_device(asked.device, cuda=True)
    scaling_queue.refuse_other_sweep(sweep, asked.out)
    there = scaling_queue.finished(asked.out)
    found = scaling_probe.estimates(sweep, there, asked.device, lambda line: print(line, file=sys.stderr, flush=True))
    lines: list[tuple[str, ...]] = []
    for point in sweep.points:
        estimate = found.get(point.name)
        took = there[point.name]["wall_s"] if estimate is None else estimate.seconds
        lines.append(
            (
                point.name,
                f"{point.gflops['pretrain'] / 1000:,.1f}",
                f"{point.gflops['finetune'] / 1000:,.1f}",
                "-" if took is None else f"{took:,.0f}",
                "finished" if estimate is None else estimate.source,
            )
        )
    print(format_table(("point", "TFLOP", "fine-tune TFLOP", "seconds", "from"), lines))
    left = [point for point in sweep.points if point.name in found]
    seconds = scaling_probe.total(list(found.values()))
    print(
        f"{len(left)} of {len(sweep.points)} points to run, {sum(point.total_gflops for point in left) / 1000:,.0f} "
        f"TFLOP, about {seconds / 3600:.1f} hours on this machine if it is left alone"
    )


def report(sweep: Sweep, asked: InverseScaling) -> None:
    """Prints the tables, and writes them and the plots beside the results."""
    there = scaling_queue.finished(asked.out)
    text: list[str] = []
    plots: list[Path] = []
    for name, data in sweep.evaluation.items():
        found = measurements(sweep, there, name)
        text.append(f"{name} ({data}): {len(found)} of {len(sweep.points)} points; accuracy is the mean of "
                    f"{', '.join(sweep.metrics)}; drop: points below the same seed's full length")  # fmt: skip
        if found:
            text += [scaling_report.format_points(found, sweep.full_tokens), ""]
            text += ["tokens needed, fitted (mean and range over seeds):"]
            text += [scaling_report.format_needed(found, sweep.full_tokens, asked.within), ""]
            plots += scaling_report.draw(found, sweep.full_tokens, name, asked.out)
    write_text(asked.out / "report.txt", "\n".join(text) + "\n")
    print("\n".join(text))
    for path in plots:
        print(f"picture: {path}")


def measurements(sweep: Sweep, there: Mapping[str, Mapping[str, Any]], name: str) -> list[Measurement]:
    """Returns the finished points of a sweep on one of its shard sets."""
    rows = [there[point.name] for point in sweep.points if point.name in there]
    return [
        Measurement(
            row["model"],
            row["image_reduction"],
            row["tokens"],
            row["text_tokens"],
            row["seed"],
            100 * scaling_queue.accuracy(row, name, sweep.metrics),
            row["gflops"],
            row["cpu_s"],
            row["wall_s"],
        )
        for row in rows
    ]


if __name__ == "__main__":
    sys.exit(main())
