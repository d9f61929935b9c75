"""A shard set in, its low-resolution copy out: the same shards with smaller images, and the set's other files.

A shard's copy is complete when its parquet exists, and is made from its source alone. So work that was killed is redone
by the shard, and neither the number of workers nor the engine changes a byte.
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import only_writer, replacing, write_text
from ..scan import MIN_SIDE
from .engine import Engine, run
from .shards import clear_left_overs
from .shrink_shard import FAILED, Job, Report, add, finished, shrink_shard

COPYING = 2
"""Raise it when the same shard gives other bytes: folders of another number are not continued."""
RECORD_NAME = "shrink.json"

# Shards, and what was made from them as they were and would not fit the copies.
_NOT_COPIED = (".tar", ".parquet", ".idx", "_stats.json", ".partial", RECORD_NAME)


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a copy."""

    short_side: int
    """Pixels."""
    quality: int
    """JPEG quality, 1 to 100."""

    def __post_init__(self) -> None:
        if self.short_side < MIN_SIDE:
            raise ValueError(f"--short-side {self.short_side} is under {MIN_SIDE}, the least that can be trained on")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"--quality {self.quality} is not between 1 and 100; 90 is usual")


def shrink(source: Path, out: Path, options: Options, engine: Engine = "local", workers: int | None = None) -> Report:
    """Copies the shards of `source` into `out`, or those still missing, and returns the report of all.

    workers: None takes every core. Raises ValueError in one line where there is nothing to copy, and where `out` holds
    something else or another process writes to it.
    """
    tars = find_shards(source)
    if out.resolve() == source.resolve():
        raise ValueError(f"--out {out} is the source itself; choose another folder for the copies")
    origin = {"copying": COPYING, "source": str(source.resolve()), **asdict(options)}
    _refuse_other_data(out, origin, tars)
    # Absolute: tasks of a Ray cluster run in other folders.
    jobs = [Job(tar.absolute(), out.absolute(), **asdict(options)) for tar in tars]
    with only_writer(out):
        if not (out / RECORD_NAME).exists():
            write_text(out / RECORD_NAME, _to_json(origin))
        clear_left_overs(out)
        _copy_other_files(source, out)
        reports = {job: report for job in jobs if (report := finished(job)) is not None}
        pending = [job for job in jobs if job not in reports]
        with tqdm(total=len(jobs), initial=len(reports), unit=" shards", desc="shrinking", smoothing=0.1) as bar:
            started, images = time.monotonic(), 0

            def advance(job: Job, report: Report) -> None:
                nonlocal images
                reports[job] = report
                images += report.samples
                bar.set_postfix_str(f"{images / (time.monotonic() - started):,.0f} images/s", refresh=False)
                bar.update()

            run(shrink_shard, pending, workers, advance, engine)
        total = add(reports[job] for job in jobs)
        write_text(out / RECORD_NAME, _to_json({**origin, "report": asdict(total)}))
    return total


def describe(report: Report, source: Path, out: Path) -> str:
    """Returns the report in words, a few lines."""
    words = {"shrunk": "shrunk", "kept": "small already", "turned": "made upright only", "converted": "made JPEG"}
    changes = [f"{count:,} {words[change]}" for change, count in report.changes.items()]
    lines = [f"{out}: {report.samples:,} samples ({', '.join(changes) or 'none could be copied'})"]
    if report.left_out:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report.left_out.items())
        lines.append(
            f"left out {sum(report.left_out.values()):,}: {reasons}; the parquet files name them (status {FAILED})"
        )
    lines += [f"{source / shard}: {problem}" for shard, problem in report.problems.items()]
    before, after = report.bytes_before, report.bytes_after
    lines.append(
        f"{before / 1e6:,.1f} MB -> {after / 1e6:,.1f} MB: saved {1 - after / max(before, 1):.1%}, "
        f"{before / max(after, 1):.1f} times smaller"
    )
    return "\n".join(lines)


def find_shards(source: Path) -> list[Path]:
    """Returns the shards in a folder, in order. Raises ValueError, in one line, where there are none."""
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give one that holds NNNNN.tar shards")
    if not (tars := sorted(path for path in source.glob("*.tar") if path.is_file())):
        raise ValueError(f"{source}: no .tar shards in it; give the folder that holds NNNNN.tar files")
    return tars


def _refuse_other_data(out: Path, origin: dict[str, Any], tars: Sequence[Path]) -> None:
    """Raises ValueError when `out` holds copies made otherwise, shards that the source lacks, or anything else."""
    path = out / RECORD_NAME
    if not path.exists():
        if strangers := sorted(entry.name for entry in out.glob("*") if entry.name != ".lock"):
            raise ValueError(
                f"{out} holds other files ({strangers[0]}, ...) and no {RECORD_NAME}; choose an empty --out"
            )
        return
    try:
        recorded = json.loads(path.read_text())
        pairs = [(name, recorded[name], value) for name, value in origin.items()]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} cannot be read; delete {out} and run the same command again") from None
    if changed := [f"{name} is {old} there and {new} here" for name, old, new in pairs if old != new]:
        raise ValueError(f"{out} holds other copies: {'; '.join(changed)}; choose another --out or delete {out}")
    if strangers := sorted({tar.name for tar in out.glob("*.tar")} - {tar.name for tar in tars}):
        raise ValueError(f"{out} holds {strangers[0]}, which the source has not (any more); delete it or the folder")


def _copy_other_files(source: Path, out: Path) -> None:
    """Copies what else the set has, such as the names of its classes."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith((".", "_")) and not path.name.endswith(_NOT_COPIED):
            with path.open("rb") as original, replacing(out / path.name) as copy:
                shutil.copyfileobj(original, copy)


def _to_json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"
