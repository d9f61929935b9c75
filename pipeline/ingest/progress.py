"""How a run goes: one line for whoever watches, and a journal beside the work lists for the report and for `status`."""

import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from tqdm import tqdm

from .accept import Report
from .fates import SUCCESS
from .staged import Staged

JOURNAL_NAME = "progress.jsonl"
_BEAT_S = 2.0


@dataclass(frozen=True)
class Moment:
    """A list that was finished."""

    run_s: float
    """Since the run began."""
    rows: int
    kept: int
    downloaded_bytes: int


BEGINNING = Moment(0.0, 0, 0, 0)
"""Of a run."""


def _line(moment: Moment) -> bytes:
    return json.dumps(asdict(moment)).encode() + b"\n"


@dataclass(frozen=True)
class Stretch:
    """What was done between two moments of working time, all runs put end to end."""

    end_s: float
    seconds: float
    rows: int
    kept: int
    downloaded_bytes: int
    is_first: bool = False
    """Of a run: it holds what it took to begin."""


class Progress:
    """One line: rows done of all, images and megabytes a second, the share that is kept, and the time left.

    Rows are done by the list, of up to 10,000; images and megabytes count from the moment that they have come, and how
    many came for lists in work is said beside them.
    """

    def __init__(self, rows: int, reports: Iterable[Report], work: Path, verb: str) -> None:
        done = list(reports)
        initial = sum(report.rows for report in done)
        self._bar = tqdm(total=rows, initial=initial, unit=" rows", unit_scale=True, desc=verb, smoothing=0.05)
        self._started = self._shown = time.monotonic()
        self._rows = initial
        self._kept = sum(report.fates.get(SUCCESS, 0) for report in done)
        self._images = self._bytes = 0
        self._staged: Staged | None = None
        self._journal: IO[bytes] = (work / JOURNAL_NAME).open("ab")
        # What a killed run had begun to write must not spoil the next line.
        self._journal.write(b"\n" + _line(BEGINNING))
        self._journal.flush()

    def add(self, report: Report) -> None:
        kept = report.fates.get(SUCCESS, 0)
        self._kept += kept
        self._images += kept
        self._rows += report.rows
        self._bytes += report.downloaded_bytes
        run_s = round(time.monotonic() - self._started, 3)
        moment = Moment(run_s, report.rows, kept, report.downloaded_bytes)
        self._journal.write(_line(moment))
        self._journal.flush()
        self._show()
        self._bar.update(report.rows)

    def beat(self, staged: Staged) -> None:
        """Keeps the line alive while no list is finished; staged: what has come for lists in work."""
        self._staged = staged
        if time.monotonic() - self._shown > _BEAT_S:
            self._show()
            self._bar.refresh()

    def _show(self) -> None:
        self._shown = time.monotonic()
        seconds = max(self._shown - self._started, 1e-9)
        images = num_bytes = 0
        if self._staged is not None:
            self._staged.look()
            images, num_bytes = self._staged.images, self._staged.image_bytes
        rate, megabytes = (self._images + images) / seconds, (self._bytes + num_bytes) / seconds / 1e6
        parts = [f"{rate:,.0f} images/s, {megabytes:,.1f} MB/s"]
        if self._rows:
            parts.append(f"{self._kept / self._rows:.1%} kept")
        if images:
            parts.append(f"{images:,} images in work")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._journal.close()


def read_journal(work: Path) -> list[Moment]:
    """Returns the moments of all runs, in order, each run after its BEGINNING; none without a journal.

    A line that was cut off is left out.
    """
    try:
        lines = (work / JOURNAL_NAME).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    moments: list[Moment] = []
    for line in lines:
        try:
            moments.append(Moment(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return moments


def stretches(moments: Iterable[Moment]) -> list[Stretch]:
    """Returns the working time between the moments, without what lay between two runs."""
    made: list[Stretch] = []
    end_s, before = 0.0, BEGINNING
    for moment in moments:
        if moment != BEGINNING:
            end_s += (seconds := moment.run_s - before.run_s)
            is_first = before == BEGINNING
            made.append(Stretch(end_s, seconds, moment.rows, moment.kept, moment.downloaded_bytes, is_first))
        before = moment
    return made


def merged(parts: list[Stretch], number: int) -> list[Stretch]:
    """Returns at most `number` stretches of about equal time, with the same sums."""
    whole_s = parts[-1].end_s if parts else 0.0
    groups: dict[int, list[Stretch]] = {}
    for part in parts:
        middle_s = part.end_s - part.seconds / 2
        groups.setdefault(min(int(number * middle_s / max(whole_s, 1e-9)), number - 1), []).append(part)
    return [
        Stretch(
            group[-1].end_s,
            sum(part.seconds for part in group),
            sum(part.rows for part in group),
            sum(part.kept for part in group),
            sum(part.downloaded_bytes for part in group),
        )
        for _, group in sorted(groups.items())
    ]
