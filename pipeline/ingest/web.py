"""A web recipe and its metadata in, shards out: select, download, accept; run again, it continues.

Beside the shards, `_work` holds the work lists of each pass over the web, what is being downloaded, and the logs. A
work list is the unit: it is done when its shard's parquet is there, and what else was downloaded for it is thrown away
when a run is interrupted. A pass asks for every row once; `retry` makes another pass of the rows that may go well now.
"""

import json
import re
import shutil
import sys
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from ..files import only_writer, write_text
from ..workers import WorkerPool
from .accept import Job, Report, Rules, accept, finished, retryable
from .environment import check_engine, python
from .fates import RETRIED
from .img2dataset import Download, Proxy, Settings
from .metadata import describe_files
from .passes import Passes, Summary, refuse_other_data, summarise
from .progress import Progress
from .recipe import record
from .select import select
from .shards import clear_left_overs
from .web_recipe import WebRecipe
from .work_lists import Plan, finish, list_path, write_lists

ACCEPTING = 2
"""Raise it when the same downloads would make other shards: folders of another number are not continued."""

LISTS_A_ROUND = 64
"""Of one img2dataset process: starting it costs seconds, and what it downloaded waits on disk in between."""
MAX_WAITING = 16
"""Downloaded lists that wait to be accepted before another round begins."""
STALLED_S = 180
"""Beyond the deadline of a picture: without a byte and without a failure for so long, img2dataset hangs."""
MAX_FAILED_STARTS = 3
ENDING_S = {"multiprocessing": 0.0, "pyspark": 20.0, "ray": 20.0}
"""How long img2dataset may take to end after its last list; an engine's own processes are better ended by it."""
_TICK_S = 0.2


@dataclass(frozen=True)
class Options:
    """What a command says beyond the recipe."""

    metadata: tuple[Path, ...] = ()
    shrink: int | None = None
    """Short side of the pictures in pixels, instead of the recipe's size."""
    retry: bool = False
    workers: int = 2
    download: Settings = field(default_factory=Settings)


def make(recipe: WebRecipe, out: Path, options: Options) -> Summary:
    """Writes the shards that a recipe says, or what is missing of them, and returns what became of the rows.

    Raises ValueError in one line where the metadata, the folder, an engine or the network cannot be used.
    """
    passes = Passes(out / "_work")
    # The metadata need not be named again.
    refuse_other_data(out, passes, _origin(recipe, options), () if options.metadata else ("--metadata",))
    if passes.current is None and not options.metadata:
        raise ValueError(f"--metadata is missing. {recipe.metadata}")
    binary = python()
    check_engine(binary, options.download.distributor)
    with only_writer(out):
        clear_left_overs(out)
        if passes.current is None:
            write_text(out / "recipe.json", json.dumps(_origin(recipe, options), indent=1) + "\n")
            print(f"selecting rows of {', '.join(path.name for path in options.metadata)}", file=sys.stderr)
            passes.begin(partial(select, recipe, options.metadata))
        fresh = _run_pass(recipe, out, options, binary, passes)
        # A pass that was only now finished is not followed by a retry of a retry.
        if options.retry and (passes.number == 1 or not fresh):
            _retry(recipe, out, options, binary, passes)
        summary = summarise(out, passes)
        write_text(out / "summary.json", json.dumps(summary.__dict__, indent=1) + "\n")
        shutil.rmtree(out / "_work" / "staging", ignore_errors=True)
    return summary


def _retry(recipe: WebRecipe, out: Path, options: Options, binary: Path, passes: Passes) -> None:
    """Runs another pass over the rows of the last one that may go well now, if there are any."""
    last = passes.current
    assert last is not None

    def plan(folder: Path) -> Plan:
        tables = (retryable(list_path(out, list_id)) for list_id in last.lists)
        first = last.first_list + last.num_lists
        num_lists, rows = write_lists((table for table in tables if table.num_rows), folder, first,
                                      recipe.samples_per_shard)  # fmt: skip
        made = Plan(first, num_lists, rows, rows, 0)
        finish(folder, made)
        return made

    reports = (finished(list_path(out, list_id)) for list_id in last.lists)
    if any(RETRIED & report.fates.keys() for report in reports if report):
        passes.begin(plan)
        _run_pass(recipe, out, options, binary, passes)


def _run_pass(recipe: WebRecipe, out: Path, options: Options, binary: Path, passes: Passes) -> bool:
    """Finishes the current pass; returns whether anything was left to do."""
    plan, lists = passes.current, passes.folder(passes.number)
    assert plan is not None
    reports = {list_id: finished(list_path(out, list_id)) for list_id in plan.lists}
    pending = [list_id for list_id, report in reports.items() if report is None]
    if not pending:
        return False
    work = out / "_work"
    shutil.rmtree(work / "staging", ignore_errors=True)
    rules = Rules.of(recipe, options.shrink)

    def job(list_id: int, staged: Path | None, cut: dict[str, str]) -> Job:
        return Job(list_path(lists, list_id), staged, out, list_id, passes.number, rules, recipe.license, cut)

    pool = WorkerPool(options.workers)
    done = [report for report in reports.values() if report is not None]
    log = work / "img2dataset.log"
    log_begins = log.stat().st_size if log.exists() else 0
    with Progress(plan.rows, done, work, "downloading") as progress:
        accepting = Accepting(pool, progress)
        try:
            with Proxy(options.download, work / "proxy.jsonl") as proxy:
                remaining = deque(_downloadable(pending, lists, accepting, job))
                failures = 0
                for number in count():
                    if not remaining:
                        break
                    accepting.wait(MAX_WAITING)
                    batch = [remaining[i] for i in range(min(LISTS_A_ROUND, len(remaining)))]
                    done = _round(
                        batch, lists, work / "staging" / str(number), binary, options, recipe, proxy, accepting, job,
                        log,
                    )  # fmt: skip
                    remaining = deque(list_id for list_id in remaining if list_id not in done)
                    failures = 0 if done else failures + 1
                    if failures == MAX_FAILED_STARTS:
                        raise ValueError(
                            f"img2dataset ended {failures} times without finishing a list; "
                            f"{log} says why ({_last_line(log, log_begins)})"
                        )
                accepting.wait(0)
        except BrokenProcessPool:
            raise ValueError("a worker process died (out of memory?); run the same command with --workers 1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return True


def _downloadable(pending: Sequence[int], lists: Path, accepting: "Accepting", job: Any) -> list[int]:
    """Returns the lists that have something to download; the others are accepted as they are."""
    wanted: list[int] = []
    for list_id in pending:
        status = pq.read_table(list_path(lists, list_id), columns=["status"])["status"]
        if status.null_count:
            wanted.append(list_id)
        else:
            accepting.add(job(list_id, None, {}))
    return wanted


def _round(batch: Sequence[int], lists: Path, staging: Path, binary: Path, options: Options, recipe: WebRecipe,
           proxy: Proxy, accepting: "Accepting", job: Any, log: Path) -> set[int]:  # fmt: skip
    """Downloads some lists with one img2dataset, handing each on when it is finished; returns which were."""
    done: set[int] = set()
    patience = STALLED_S + options.download.deadline_s
    paths = [list_path(lists, list_id) for list_id in batch]
    with Download(binary, paths, staging, options.download, recipe.opt_out, proxy, log) as download:
        ending: float | None = None
        while True:
            # Asked before the shards are looked at: what it finished last must not be missed.
            ended = download.ended
            for path, staged in download.finished():
                list_id = int(path.stem)
                done.add(list_id)
                proxy.read_log()
                accepting.add(job(list_id, staged, dict(proxy.cut)))
            accepting.reap()
            if ended or not proxy.alive:
                break
            if download.all_finished:
                ending = ending or time.monotonic()
                if time.monotonic() - ending >= ENDING_S[options.download.distributor]:
                    break
            elif download.idle_s() > patience:
                print(f"img2dataset stood still for {patience} s; starting it again", file=sys.stderr)
                break
            accepting.progress.beat(download.staged)
            time.sleep(_TICK_S)
    if not proxy.alive:
        raise ValueError("the download proxy ended; run the same command to continue")
    return done


class Accepting:
    """Lists on their way through the worker processes into shards; what was staged for them goes when they are."""

    def __init__(self, pool: WorkerPool, progress: Progress) -> None:
        self._pool = pool
        self.progress = progress
        self._running: dict[Future[Report], Job] = {}

    def add(self, job: Job) -> None:
        self._running[self._pool.submit(accept, job)] = job

    def reap(self) -> None:
        """Takes in what is done. Raises what went wrong."""
        for future in [future for future in self._running if future.done()]:
            job = self._running.pop(future)
            report = future.result()
            if job.staged is not None:
                for suffix in (".tar", ".parquet"):
                    job.staged.with_suffix(suffix).unlink(missing_ok=True)
            # Last, so that its pictures are not counted as in work too.
            self.progress.add(report)

    def wait(self, at_most: int) -> None:
        """Returns when no more than so many lists are waiting."""
        self.reap()
        while len(self._running) > at_most:
            time.sleep(_TICK_S / 4)
            self.reap()


def _origin(recipe: WebRecipe, options: Options) -> dict[str, Any]:
    """Returns all that decides what is made, as recipe.json keeps it."""
    return {
        "accepting": ACCEPTING,
        "shrink": options.shrink,
        "--metadata": describe_files(options.metadata),
        **record(recipe),
    }


def _last_line(log: Path, start: int) -> str:
    """The last line of a log, from a byte on, that tells an error; where none does, the last."""
    said = log.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Killed)\b", line)]
    return (errors or lines or ["it said nothing"])[-1][:200]
