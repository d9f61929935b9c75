"""Statistics in, plain tables out: what `ingest.py report` and `ingest.py status` print."""

import fcntl
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from ..table import format_table
from .accept import Report, finished
from .fates import RETRIED, SUCCESS
from .passes import Passes
from .progress import Stretch, merged, read_journal, stretches
from .statistics import OTHERS, Statistics, shard_parquets
from .work_lists import list_path

MAX_PLACES_SHOWN = 15
MAX_STRETCHES = 10
CHANGES = {
    "kept": "with the bytes they came with",
    "shrunk": "made smaller",
    "turned": "turned upright",
    "retouched": "of their size, grey made RGB or faces blurred",
    "converted": "made JPEG of another kind of file",
}
"""Copy.change -> in words."""


def report_text(found: Statistics, out: Path) -> str:
    """Returns the report on a folder as tables."""
    rows = found.rows
    head = (
        f"{out}: {found.num_kept:,} of {rows:,} rows kept, that is, in a shard ({found.num_kept / rows:.1%}); "
        f"{found.shards:,} shards, {size(found.shard_bytes)}, from {size(found.downloaded_bytes)} of picture files"
    )
    fates = [
        (fate, f"{number:,}", f"{number / rows:.1%}", "yes" if fate in RETRIED else "")
        for fate, number in found.fates.most_common()
    ]
    parts = [head, format_table(("status", "rows", "share", "can be retried"), fates)]
    if found.places:
        shown = [
            (printable(place), f"{number:,}", f"{kept:,}", f"{kept / number:.1%}")
            for place, number, kept in top_places(found, MAX_PLACES_SHOWN)
        ]
        parts.append(format_table((found.place, "rows", "kept", "share"), shown))
    shares = (0.0, 0.1, 0.5, 0.9, 1.0)
    spreads = [
        (name, *(f"{spread.percentile(share):,}" for share in shares))
        for name, spread in (
            ("short side as it came, pixels", found.original),
            ("short side as stored, pixels", found.stored),
            ("caption, characters", found.captions),
        )
    ]
    if found.num_kept:
        parts.append(format_table(("of what was kept", "least", "10%", "median", "90%", "most"), spreads))
        changed = ", ".join(f"{number:,} {CHANGES.get(name, name)}" for name, number in found.changes.most_common())
        parts.append(f"pictures in the shards: {changed}")
    if found.time:
        passed = [
            (
                f"to {duration(part.end_s)}",
                f"{part.rows:,}",
                f"{part.kept / max(part.rows, 1):.1%}",
                f"{part.rows / max(part.seconds, 1e-9):,.0f}",
                f"{part.downloaded_bytes / max(part.seconds, 1e-9) / 1e6:,.1f}",
            )
            for part in merged(found.time, MAX_STRETCHES)
        ]
        parts.append(format_table(("working time", "rows", "kept", "rows/s", "MB/s"), passed))
    return "\n\n".join(parts)


def top_places(found: Statistics, most: int) -> list[tuple[str, int, int]]:
    """Returns the places with the most rows (place, rows, kept), at most so many, and then all others together."""
    places = [(place, rows, found.kept[place]) for place, rows in found.places.most_common() if place != OTHERS]
    shown = places[:most]
    rest = found.places.total() - sum(rows for _, rows, _ in shown)
    kept = found.kept.total() - sum(kept for *_, kept in shown)
    return [*shown, (OTHERS, rest, kept)] if rest else shown


def status_text(out: Path) -> str:
    """Returns what of a folder is done, what is left and can be retried, and about what that costs.

    Raises ValueError, in one line, where the folder is none of ingestion's.
    """
    passes = Passes(out / "_work")
    if passes.plans:
        reports, left = _gathered(passes, out)
    else:
        reports = [report for path in shard_parquets(out) if (report := finished(path)) is not None]
        left = Counter[str | None]()
        if not reports and (out / "_work").is_dir():
            going = "are being listed" if _is_held(out) else "were not all listed; run the same command again"
            return f"{out}: nothing is done yet: the rows {going}"
        if not reports:
            raise ValueError(f"{out}: nothing of ingestion in it; give the folder that ingest.py --out named")
    # Rows of an unfinished retry have a fate already, and are being asked again: they are left, and neither done nor to
    # be retried until that is over.
    fates = _fates(reports)
    kept = fates.get(SUCCESS, 0)
    over = {fate: rest for fate, number in fates.items() if (rest := number - left[fate])}
    again = {fate: number for fate, number in over.items() if fate in RETRIED}
    attempts = sum(report.rows for report in reports)
    shard_bytes = sum(report.shard_bytes for report in reports)
    downloaded = sum(report.downloaded_bytes for report in reports)
    parts = stretches(read_journal(out / "_work"))

    def cost(rows: int, bytes_each: float) -> tuple[str, str]:
        if not rows:
            return "", ""
        seconds = expected_s(parts, rows)
        return size(rows * bytes_each) if reports else "unknown", "unknown" if seconds is None else duration(seconds)

    rows, num_left, num_again = sum(over.values()), left.total(), sum(again.values())
    same = "the same command"
    table = [
        ("done", f"{rows:,}", size(downloaded), duration(parts[-1].end_s) if parts else "unknown", ""),
        ("left", f"{num_left:,}", *cost(num_left, downloaded / max(attempts, 1)), same if num_left else ""),
        # At most: as if every one went well this time.
        ("can be retried", f"{num_again:,}", *cost(num_again, downloaded / max(kept, 1)),
         f"{same} with --retry" if num_again else ""),
    ]  # fmt: skip
    shards = sum(bool(report.shard_bytes) for report in reports)
    running = "; a run is going on" if _is_held(out) else ""
    lines = [f"{out}: {kept:,} pairs in {shards:,} shards, {size(shard_bytes)}{running}"]
    if rows:
        lines[0] += f"; {kept / rows:.1%} of the rows that are done are kept"
        if again:
            lines.append("can be retried: " + ", ".join(f"{number:,} {fate}" for fate, number in again.items()))
    header = ("", "rows", "bytes read", "working time", "how")
    if not passes.plans:
        lines.append(f"{out / '_work'} is gone, so nothing more can be made here")
    costs = "what is left and retried costs about so much, at the rates seen here"
    return "\n".join([*lines, "", format_table(header, table), costs if num_left or again else "nothing is left to do"])


def _gathered(passes: Passes, out: Path) -> tuple[list[Report], Counter[str | None]]:
    """Returns the reports of what is done, and the rows that are left: their fate so far, None without, -> rows."""
    reports: list[Report] = []
    left: Counter[str | None] = Counter()
    for number, plan in enumerate(passes.plans, 1):
        found = {list_id: finished(list_path(out, list_id)) for list_id in plan.lists}
        done = [report for report in found.values() if report is not None]
        reports += done
        if number == 1:
            left[None] = plan.rows - sum(report.rows for report in done)
            continue
        for list_id in (list_id for list_id, report in found.items() if report is None):
            rows = pq.read_table(list_path(passes.folder(number), list_id), columns=["previous_status"])
            left.update(rows["previous_status"].to_pylist())
    return reports, left


def expected_s(parts: Sequence[Stretch], rows: int) -> float | None:
    """Returns how long a run over so many rows takes, as runs went before; None where nothing is known.

    A run needs some time before its first list is finished, then the rows come at the mean rate.
    """
    if not parts or not parts[-1].end_s:
        return None
    starts = sorted(part.seconds for part in parts if part.is_first)
    return starts[len(starts) // 2] + rows * parts[-1].end_s / sum(part.rows for part in parts)


def _fates(reports: Sequence[Report]) -> dict[str, int]:
    """What became of the rows, by their last fate, the most frequent first."""
    fates: dict[str, int] = {}
    for report in reports:
        for fate, number in report.fates.items():
            fates[fate] = fates.get(fate, 0) + number
        for fate, number in report.previous.items():
            fates[fate] = fates.get(fate, 0) - number
    return {fate: number for fate, number in sorted(fates.items(), key=lambda entry: -entry[1]) if number}


def _is_held(out: Path) -> bool:
    """Whether a process is writing to a folder."""
    try:
        with (out / ".lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def printable(text: str) -> str:
    """Returns a name as it can be printed and drawn anywhere: other characters than ASCII as escapes, cut to 40."""
    safe = "".join(character if " " <= character <= "~" else ascii(character)[1:-1] for character in text)
    return safe if len(safe) <= 40 else f"{safe[:37]}..."


def size(num_bytes: float) -> str:
    """Returns a number of bytes in kB, MB, GB or TB."""
    for unit in ("kB", "MB", "GB"):
        num_bytes /= 1000
        if num_bytes < 1000:
            return f"{num_bytes:,.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} TB"


def duration(seconds: float) -> str:
    """Returns a time as `8 s`, `12 min`, `3.4 h` or `5.2 days`."""
    if seconds < 90:
        return f"{seconds:.1f} s" if 0 < seconds < 9.95 else f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
