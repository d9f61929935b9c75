"""Own pictures in, the same shards out as from the web: a folder, a table of paths and captions, or other shards.

Listing comes first, into work lists as for the web, a row for each picture, with what is known to be wrong with it;
then accepting decodes, checks and repairs. Run again, it continues, but for a source that has changed, which is
refused; the number of workers changes no byte.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..files import only_writer, write_text
from ..scan import MIN_SIDE
from .accept import Job, Rules, accept, finished
from .advice import unread_table
from .changed import changes
from .engine import run
from .fetched import Own
from .listing import Listing, Table, holds_pictures, list_folder, list_shards, list_table
from .metadata import describe_files
from .passes import Passes, Summary, refuse_other_data, summarise
from .picture import MAX_JPEG_SIDE
from .progress import Progress
from .shards import clear_left_overs
from .shrink import find_shards
from .work_lists import Plan, finish, list_path, write_lists

LISTING = 2
"""Raise it when the same source would give other rows or other bytes: folders of another number are not continued."""
SAMPLES_PER_SHARD = 10_000
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Options:
    """What decides the shards, beside the pictures."""

    kind: Literal["folder", "shards"]
    table: Path | None = None
    """Paths and captions of a folder's pictures; without it, captions stand beside them."""
    path_column: str = "path"
    caption_column: str = "caption"
    shrink: int | None = None
    """Short side in pixels; None: sizes stay."""
    min_image_size: int = 32
    max_aspect_ratio: int = 10
    license: str = ""
    samples_per_shard: int = SAMPLES_PER_SHARD

    def __post_init__(self) -> None:
        if self.shrink is not None and not MIN_SIDE <= self.shrink <= MAX_JPEG_SIDE:
            raise ValueError(f"--shrink {self.shrink} is outside {MIN_SIDE} to {MAX_JPEG_SIDE:,}")
        if self.min_image_size < MIN_SIDE:
            raise ValueError(f"--min-image-size {self.min_image_size} is under {MIN_SIDE}, the least to train on")
        if self.max_aspect_ratio < 1:
            raise ValueError(f"--max-aspect-ratio {self.max_aspect_ratio} is less than 1; 10 is usual")
        if not 1 <= self.samples_per_shard <= SAMPLES_PER_SHARD:
            raise ValueError(f"--samples-per-shard {self.samples_per_shard} is outside 1 to {SAMPLES_PER_SHARD:,}")

    @property
    def rules(self) -> Rules:
        size, mode = (self.shrink, "keep_ratio") if self.shrink else (MAX_JPEG_SIDE, "no")
        return Rules(size, mode, JPEG_QUALITY, self.min_image_size, self.max_aspect_ratio, "")


def make(source: Path, out: Path, options: Options, workers: int) -> Summary:
    """Writes the shards of own pictures, or what is missing of them, and returns what became of each.

    Raises ValueError in one line where the source or the folder cannot be used, and where the source has changed.
    """
    root = _check(source, out)
    tars = shards_in(source) if options.kind == "shards" else []
    passes = Passes(out / "_work")
    origin = _origin(root, options, tars)
    # What has changed in these is said in more words below.
    refuse_other_data(out, passes, origin, ("table", "shards"))
    base = root if options.table is None else options.table.resolve().parent
    own = Own(root, base, options.kind == "shards")
    with only_writer(out):
        if passes.current is None:
            clear_left_overs(out)
            write_text(out / "recipe.json", json.dumps(origin, indent=1) + "\n")
            passes.begin(partial(_plan, source=source, out=out, options=options, tars=tars))
        else:
            _refuse_changed(source, out, passes, own, _listing(root, options, tars))
            clear_left_overs(out)
        _accept(passes, out, own, options, workers)
        summary = summarise(out, passes)
        write_text(out / "summary.json", json.dumps(summary.__dict__, indent=1) + "\n")
    return summary


def _check(source: Path, out: Path) -> Path:
    if not source.is_dir():
        raise ValueError(f"{source}: no such folder; give the one that holds the pictures or shards")
    root = source.resolve()
    if out.resolve().is_relative_to(root):
        raise ValueError(f"--out {out} lies in the source {source}; choose a folder outside it")
    return root


def shards_in(source: Path) -> list[Path]:
    """Returns the shards in a folder, in order. Raises ValueError, in one line, where there are none."""
    if not any(source.glob("*.tar")) and holds_pictures(source):
        raise ValueError(f"{source}: no .tar shards in it, but pictures: {advice(source)}")
    return find_shards(source)


def advice(folder: Path) -> str:
    """Returns the command that makes shards of a folder of pictures."""
    return f"python ingest.py folder {folder} --out DIR"


def _origin(root: Path, options: Options, tars: list[Path]) -> dict[str, Any]:
    """All that decides what is made, as recipe.json keeps it."""
    said = {name: value for name, value in options.__dict__.items() if name not in ("kind", "table")}
    origin = {"listing": LISTING, "source": options.kind, "from": str(root), **said}
    if options.kind == "shards":
        total = sum(tar.stat().st_size for tar in tars)
        return origin | {"shards": f"{len(tars):,} files of {total:,} bytes"}
    table = None if options.table is None else str(options.table.resolve())
    return origin | {"--metadata": table, "table": table and describe_files([Path(table)])}


def _listing(root: Path, options: Options, tars: list[Path]) -> Listing:
    if options.kind == "shards":
        return list_shards(tars)
    if options.table is None:
        return list_folder(root)
    return list_table(Table(options.table, options.path_column, options.caption_column))


def _refuse_changed(source: Path, out: Path, passes: Passes, own: Own, listing: Listing) -> None:
    """Raises ValueError where the source is not as it was when `out` was begun."""
    plan, lists = passes.current, passes.folder(passes.number)
    assert plan is not None
    jobs = [(list_path(lists, list_id), list_path(out, list_id)) for list_id in plan.lists]
    if found := changes(listing.tables, jobs, own):
        raise ValueError(
            f"{source} has changed since {out} was begun: {'; '.join(found)}. Choose another --out, or delete {out}; "
            "what only came in addition can be a source of its own: train.py --data A B"
        )


def _plan(folder: Path, source: Path, out: Path, options: Options, tars: list[Path]) -> Plan:
    listing = _listing(source.resolve(), options, tars)
    num_lists, rows = write_lists(listing.tables, folder, 0, options.samples_per_shard)
    if not rows:
        raise ValueError(f"{options.table or source}: no pictures in it")
    statuses = {status: count for status, count in listing.statuses.items() if count}
    # Before an hour of pictures is given the names of their folders as captions.
    is_bare = options.kind == "folder" and options.table is None and not listing.beside
    if is_bare and sum(statuses.values()) < rows and (note := unread_table(source, out)) is not None:
        print(note, file=sys.stderr)
    plan = Plan(0, num_lists, rows, rows + listing.others, listing.others, statuses, listing.problems)
    finish(folder, plan)
    return plan


def _accept(passes: Passes, out: Path, own: Own, options: Options, workers: int) -> None:
    plan, lists, rules = passes.current, passes.folder(passes.number), options.rules
    assert plan is not None
    reports = {list_id: finished(list_path(out, list_id)) for list_id in plan.lists}
    jobs = [
        Job(list_path(lists, list_id), None, out, list_id, passes.number, rules, options.license, own=own)
        for list_id, report in reports.items()
        if report is None
    ]
    done = [report for report in reports.values() if report is not None]
    with Progress(plan.rows, done, passes.work, "reading") as progress:
        run(accept, jobs, workers, lambda _, report: progress.add(report))
