"""Jobs in, their results out as they come: in this process, in worker processes, or as tasks of a Ray cluster.

A job is a whole shard, so handing it over costs nothing beside it. What the jobs write must not depend on who runs
them: then neither the number of workers nor the engine changes a byte.
"""

import importlib
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal, TypeVar

from ..workers import WorkerPool

Job = TypeVar("Job")
Result = TypeVar("Result")
Engine = Literal["local", "ray"]

_RAY_OBJECT_STORE_BYTES = 128 << 20
"""Jobs travel by name and results are counts; Ray's default takes 30 % of the memory."""


def run(
    task: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int | None,
    done: Callable[[Job, Result], None],
    engine: Engine = "local",
) -> None:
    """Runs `task` on each job, `workers` at a time (None: one a core), and calls `done` here after each.

    Raises what `task` raises, and ValueError in one line when a worker dies or the engine is not installed.
    """
    if engine == "ray":
        _run_ray(task, jobs, workers, done)
        return
    workers = min(workers or os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        for job in jobs:
            done(job, task(job))
        return
    pool = WorkerPool(workers)
    try:
        running = {pool.submit(task, job): job for job in jobs}
        for future in as_completed(running):
            done(running[future], future.result())
    except BrokenProcessPool:
        raise ValueError("a worker process died (out of memory?); run the same command with --workers 1") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _run_ray(
    task: Callable[[Job], Result], jobs: Sequence[Job], workers: int | None, done: Callable[[Job, Result], None]
) -> None:
    """The same on the cluster that RAY_ADDRESS names, else on a Ray of this machine's own, which ends with the run."""
    if not jobs:
        return
    # Ray reports its use to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        # By name: Ray is an extra, and without it this module must pass the type checker too.
        ray: Any = importlib.import_module("ray")
    except ImportError:
        raise ValueError("--engine ray needs Ray, which is not installed: pip install 'ray>=2.40,<3'") from None
    if "RAY_ADDRESS" in os.environ:
        settings: dict[str, Any] = {}
    else:
        settings = {"num_cpus": workers, "object_store_memory": _RAY_OBJECT_STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(logging_level=logging.ERROR, **settings)
    except Exception as error:  # a node that is slow to start is a bare Exception
        raise ValueError(f"Ray does not start: {(str(error) or repr(error)).splitlines()[0]}") from None
    try:
        limit = workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)
        remote = ray.remote(task)
        waiting = iter(jobs)
        running: dict[Any, Job] = {}
        # Tasks are handed out as others end: a scheduler that holds 40,000 at once only slows down.
        while True:
            running.update({remote.remote(job): job for job in islice(waiting, limit - len(running))})
            if not running:
                return
            for finished in ray.wait(list(running))[0]:
                job = running.pop(finished)
                done(job, ray.get(finished))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ValueError(f"Ray lost a task: {str(error).splitlines()[0]}; run the same command to continue") from None
    finally:
        ray.shutdown()
