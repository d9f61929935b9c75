"""The passes over the web that a folder has seen (over own data, one), and what became of its rows over all of them.

`_work/pass-1`, `_work/pass-2` and so on hold the work lists of each. A row stands in one list of the first pass, and in
one of each later pass that tried it again; it counts by its last fate.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .accept import finished
from .fates import RETRIED, SUCCESS
from .recipe import differences
from .work_lists import Plan, list_path, read_plan


class Passes:
    """The passes over the web of a folder: `_work/pass-1`, `_work/pass-2` and so on, each with its plan."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.plans: list[Plan] = []
        while (plan := read_plan(self.folder(len(self.plans) + 1))) is not None:
            self.plans.append(plan)

    def folder(self, number: int) -> Path:
        return self.work / f"pass-{number}"

    @property
    def number(self) -> int:
        return len(self.plans)

    @property
    def current(self) -> Plan | None:
        return self.plans[-1] if self.plans else None

    def begin(self, plan: Callable[[Path], Plan]) -> Plan:
        """Adds a pass, there once it is whole; plan: writes work lists into a folder and returns their plan."""
        folder = self.folder(self.number + 1)
        unfinished = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        made = plan(unfinished)
        unfinished.rename(folder)
        self.plans.append(made)
        return made


def refuse_other_data(out: Path, passes: Passes, origin: Mapping[str, Any], unsaid: Collection[str] = ()) -> None:
    """Raises ValueError when `out` is made from something else, or holds files that no ingestion made.

    origin: all that decides what is made; unsaid: of that, what the command leaves as it was.
    """
    record = out / "recipe.json"
    if passes.current is None:
        # Nothing was selected yet: a recipe that did not fit the metadata may be corrected.
        strangers = sorted(entry.name for entry in out.glob("*") if not _is_beginning(entry.name))
        if strangers:
            raise ValueError(f"{out} holds other files ({strangers[0]}, ...); choose an empty --out")
        return
    try:
        made = json.loads(record.read_text())
    except (OSError, ValueError):
        raise ValueError(f"{record} cannot be read; delete {out} and run the same command again") from None
    here = {**origin, **{name: made.get(name) for name in unsaid}}
    if found := differences(made, here):
        raise ValueError(f"{out} was made otherwise: {'; '.join(found)}; choose another --out or delete {out}")


def _is_beginning(name: str) -> bool:
    half_written = name.startswith("recipe.json.") and name.endswith(".partial")
    return name in (".lock", "_work", "recipe.json") or half_written


@dataclass(frozen=True)
class Summary:
    """What became of every row."""

    rows: int
    rows_read: int
    filtered_out: int
    fates: dict[str, int]
    shards: int
    shard_bytes: int
    downloaded_bytes: int
    passes: int
    problems: dict[str, str] = field(default_factory=dict[str, str])
    """Of own shards: file -> what is wrong with it as a whole."""

    @property
    def kept(self) -> int:
        """Rows in a shard."""
        return self.fates.get(SUCCESS, 0)

    @property
    def retryable(self) -> int:
        return sum(number for fate, number in self.fates.items() if fate in RETRIED)


def summarise(out: Path, passes: Passes) -> Summary:
    """Returns what became of the rows, each counted by its last fate."""
    fates: Counter[str] = Counter()
    shards = shard_bytes = downloaded = 0
    for plan in passes.plans:
        for list_id in plan.lists:
            if (report := finished(list_path(out, list_id))) is not None:
                fates.update(report.fates)
                fates.subtract(report.previous)
                shards += bool(report.shard_bytes)
                shard_bytes += report.shard_bytes
                downloaded += report.downloaded_bytes
    first = passes.plans[0]
    ordered = {fate: number for fate, number in fates.most_common() if number}
    return Summary(
        first.rows, first.rows_read, first.filtered_out, ordered, shards, shard_bytes, downloaded, passes.number,
        first.problems,
    )  # fmt: skip


def describe(summary: Summary, out: Path) -> str:
    """Returns the summary in words, a few lines."""
    good = summary.kept
    lines = [
        f"{out}: {good:,} pairs in {summary.shards:,} shards, {summary.shard_bytes / 1e6:,.1f} MB, "
        f"from {summary.downloaded_bytes / 1e6:,.1f} MB of picture files",
        f"{summary.rows:,} of {summary.rows_read:,} rows selected, {good / max(summary.rows, 1):.1%} of them kept",
    ]
    lost = [f"{number:,} {fate}" for fate, number in summary.fates.items() if fate != SUCCESS]
    if lost:
        lines.append(f"left out {summary.rows - good:,}: {', '.join(lost)}")
    lines += [f"{name}: {problem}; what stood behind is lost" for name, problem in summary.problems.items()]
    if summary.retryable:
        lines.append(f"{summary.retryable:,} may go well another time: the same command with --retry")
    return "\n".join(lines)
