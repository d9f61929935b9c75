"""Steps in, ready batches out, in order, made by worker processes: the GIL of this one is left to the training.

A batch is a pure function of its step, so any worker may make any, and what a killed one was making is made again.
Only a slot's number and what was found bad travel between processes (about 100 us of the GIL a batch); pixels are
written into shared memory once. Nothing outlives the processes, however they end: no file, no name, no semaphore.
"""

import functools
import io
import math
import mmap
import os
import pickle
import signal
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .batch import Batch, Rejection
from .slabs import Field, Slab, memory_file
from .store import Store
from .workers import ctrl_c_blocked

if TYPE_CHECKING:
    from .loader import Loader

MAX_DEATHS = 3
"""Workers that may die within DEATH_WINDOW batches; each is replaced."""
DEATH_WINDOW = 1000
_LENT = 2
"""Batches that the consumer has at a time: the one in its hands, and the one before, which goes as it takes the new."""

_LRU_CACHE = type(functools.lru_cache(len))


class WorkerDied(ValueError):
    """Workers of the loader die faster than replacing them makes sense."""


class Task(NamedTuple):
    """What a worker is told: make this step's batch into this slot."""

    step: int
    slot: int
    known_bad: dict[int, str]
    """Of the loader's, what this worker has not been told yet."""


class Done(NamedTuple):
    """What a worker answers to a task; step None where it could not begin."""

    step: int | None
    rejected: tuple[Rejection, ...] = ()
    known_bad: Mapping[int, str] = {}
    """What it found."""
    stage_seconds: Mapping[str, float] = {}
    cpu_seconds: float = 0.0
    """Of the worker, all its threads, since the answer before."""
    error: Exception | None = None


def process_batches(loader: "Loader", steps: range, workers: int, prefetch: int) -> Generator[Batch]:
    """Yields the batches of consecutive steps in order, made by `workers` processes, at most workers + prefetch ahead.

    A batch's tensors lie in shared memory, which is not written to again before they are gone; who keeps more than two
    batches gets copies. Raises what making a batch raises, and WorkerDied.
    """
    in_flight = workers + prefetch
    with _Processes(loader, workers, in_flight + _LENT, steps.stop).started() as processes:
        ahead: deque[tuple[int, int]] = deque()
        coming = iter(steps)
        for step in islice(coming, in_flight):
            ahead.append((step, processes.hand_out(step)))
        while ahead:
            step, slot = ahead.popleft()
            done = processes.result(step)
            lent = processes.slab.lent()
            tensors = processes.slab.tensors(slot)
            if len(lent) >= _LENT:
                # Not torch's clone: it would call up the step's OpenMP threads for a copy.
                tensors = {name: torch.from_numpy(each.numpy().copy()) for name, each in tensors.items()}
            processes.taken.discard(slot)
            for later in islice(coming, 1):
                ahead.append((later, processes.hand_out(later)))
            batch = Batch(**tensors, grid=loader.settings.geometry.grid, rejected=done.rejected)
            del tensors
            yield batch
            del batch


@dataclass
class _Worker:
    number: int
    process: "subprocess.Popen[bytes]"
    connection: Connection
    tasks: deque[tuple[int, int]] = field(default_factory=deque[tuple[int, int]])
    """(step, slot) of each that is not answered yet; the first is being made."""
    told: int = 0
    """How many of known_bad."""


class _Processes:
    """The workers of one loader, and the slab that they share. Used by one thread."""

    def __init__(self, loader: "Loader", workers: int, num_slots: int, end_step: int) -> None:
        self.loader, self.num_workers = loader, workers
        self.slab = Slab(batch_fields(loader), num_slots)
        self.taken: set[int] = set()
        """Slots of batches that are being made, or not handed over yet."""
        self._state = memory_file("shortclip loader")
        _write(self._state, _frozen(loader, workers, num_slots, end_step))
        self._workers: list[_Worker] = []
        self._done: dict[int, Done] = {}
        self._received = 0
        self._deaths: deque[int] = deque()
        """At which number of answers each of the last workers died."""

    @contextmanager
    def started(self) -> Generator["_Processes"]:
        # What this process has open after it built an index, no worker could evict.
        self.loader.index.store.cache.release()
        try:
            for number in range(self.num_workers):
                self._workers.append(self._start(number))
            yield self
        finally:
            self._end()

    def hand_out(self, step: int) -> int:
        """Gives a step to the worker that has least to do. Returns the slot."""
        self._receive(0)
        used = self.taken | self.slab.lent()
        slot = next(slot for slot in range(self.slab.num_slots) if slot not in used)
        self.taken.add(slot)
        worker = min(self._workers, key=lambda worker: len(worker.tasks))
        worker.tasks.append((step, slot))
        self._send(worker, step, slot)
        return slot

    def result(self, step: int) -> Done:
        """Waits until a step's batch is in its slot. Raises what making it raised."""
        while step not in self._done:
            self._receive(None)
        done = self._done.pop(step)
        # Here, not as answers come: what a batch cost is counted when it is taken, however early it was made.
        for stage, seconds in done.stage_seconds.items():
            self.loader.stage_seconds[stage] += seconds
        self.loader.worker_seconds += done.cpu_seconds
        if done.error is not None:
            raise done.error
        return done

    def _start(self, number: int) -> _Worker:
        ours, theirs = Pipe()
        descriptors = (theirs.fileno(), self._state, self.slab.descriptor)
        # -P and the path: this very package, whatever lies in the folder where the command was given.
        command = [sys.executable, "-P", "-m", f"{__package__}.loader_worker", *map(str, descriptors), str(os.getpid())]
        path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
        # One thread each, and no GPU: the batches are made on the CPU, and a context costs memory there.
        settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with closing(theirs), ctrl_c_blocked():
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, pass_fds=descriptors, env={**os.environ, **settings}
            )
        return _Worker(number, process, ours)

    def _send(self, worker: _Worker, step: int, slot: int) -> None:
        news = dict(islice(self.loader.known_bad.items(), worker.told, None))
        worker.told += len(news)
        # A worker that is gone is found, and replaced, where answers are received.
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(Task(step, slot, news))

    def _receive(self, timeout: float | None) -> None:
        """Takes the answers that are there; waits for one at least, up to `timeout` seconds (None: without end)."""
        ready = wait([worker.connection for worker in self._workers], timeout)
        for worker in [worker for worker in self._workers if worker.connection in ready]:
            try:
                done: Done = worker.connection.recv()
            except (EOFError, OSError):
                self._replace(worker)
                continue
            if done.step is None:
                assert done.error is not None
                raise done.error
            step, _ = worker.tasks.popleft()
            assert step == done.step
            self._received += 1
            self._done[step] = done
            for sample, reason in done.known_bad.items():
                self.loader.known_bad.setdefault(sample, reason)

    def _replace(self, worker: _Worker) -> None:
        worker.connection.close()
        worker.process.kill()  # it may have closed its socket and live on
        status = worker.process.wait()
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        doing = f" while it made step {worker.tasks[0][0]:,}" if worker.tasks else ""
        what = f"worker {worker.number} of the loader (process {worker.process.pid}) {how}{doing}"
        while self._deaths and self._deaths[0] < self._received - DEATH_WINDOW:
            self._deaths.popleft()
        self._deaths.append(self._received)
        if len(self._deaths) > MAX_DEATHS:
            raise WorkerDied(
                f"{what}, the {MAX_DEATHS + 1}th such death within {DEATH_WINDOW:,} batches; if memory is short, lower "
                "--workers or --prefetch; then run the same command again"
            )
        print(f"{what}; started again ({len(self._deaths)} of {MAX_DEATHS})", file=sys.stderr, flush=True)
        fresh = self._start(worker.number)
        fresh.tasks = worker.tasks
        self._workers[self._workers.index(worker)] = fresh
        for step, slot in fresh.tasks:
            self._send(fresh, step, slot)

    def _end(self) -> None:
        # Closing alone would end them, and does where this is interrupted; they have nothing to put in order.
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()
        os.close(self._state)
        self.slab.close()


class BatchMaker:
    """A worker's side: messages in, batches into slots, answers out, as bytes."""

    def __init__(self, state: int, slab: int) -> None:
        """state, slab: descriptors of what the parent wrote, and of the slab. Raises what making a Loader raises."""
        from .loader import Loader

        with closing(mmap.mmap(state, 0, prot=mmap.PROT_READ)) as frozen:
            arguments, ranks, num_slots, self._end_step = pickle.loads(frozen)
        self._loader = Loader(*arguments, **ranks)
        self._slab = Slab(batch_fields(self._loader), num_slots, slab)
        self._answered = time.process_time()

    def answer(self, message: bytes) -> bytes:
        task: Task = pickle.loads(message)
        loader = self._loader
        loader.known_bad.update(task.known_bad)
        known = len(loader.known_bad)
        loader.stage_seconds.update(dict.fromkeys(loader.stage_seconds, 0.0))
        try:
            # Here, not in the parent: fetching costs the GIL, and a file that the parent held could not be evicted.
            loader.fetch_ahead(task.step, self._end_step)
            batch = loader.batch(task.step)
            for name, tensor in self._slab.tensors(task.slot).items():
                tensor.copy_(getattr(batch, name))
            done = Done(task.step, batch.rejected)
        except Exception as error:
            done = Done(task.step, error=_portable(error))
        found = dict(islice(loader.known_bad.items(), known, None))
        before, self._answered = self._answered, time.process_time()
        return pickle.dumps(
            done._replace(known_bad=found, stage_seconds=loader.stage_seconds, cpu_seconds=self._answered - before)
        )

    def idle(self) -> None:
        """Lets go of what other workers may need."""
        if self._loader.index.remote:
            self._loader.index.store.cache.release()

    @staticmethod
    def failure(error: Exception) -> bytes:
        """Returns the answer of a worker that cannot begin."""
        return pickle.dumps(Done(None, error=_portable(error)))


def batch_fields(loader: "Loader") -> dict[str, Field]:
    """Returns the tensors of a loader's training batches, as in batch.Batch."""
    size, geometry = loader.local_batch_size, loader.settings.geometry
    return {
        "patches": Field(torch.uint8, (size, geometry.tokens, geometry.patch_values)),
        "positions": Field(torch.int16, (size, geometry.tokens)),
        "caption_ids": Field(torch.int32, (size, loader.settings.text_tokens)),
        "valid": Field(torch.bool, (size,)),
        "sample_ids": Field(torch.int64, (size,)),
    }


def _portable(error: Exception) -> Exception:
    """The error as it may travel, with where it came from for who prints a traceback."""
    error.add_note("in a worker process of the loader:\n" + "".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _frozen(loader: "Loader", workers: int, num_slots: int, end_step: int) -> bytes:
    """What a worker makes its loader of."""
    ranks = {"rank": loader.rank, "world_size": loader.world_size}
    stream = io.BytesIO()
    _Pickler(stream, workers).dump(((loader.index, loader.order, loader.settings), ranks, num_slots, end_step))
    return stream.getvalue()


class _Pickler(pickle.Pickler):
    """Index and order as they are, but for what a process has of its own: caches travel empty, stores unconnected."""

    def __init__(self, stream: io.BytesIO, workers: int) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._workers = workers

    def reducer_override(self, obj: Any, /) -> Any:
        if isinstance(obj, _LRU_CACHE):
            return _cached, (obj.cache_parameters()["maxsize"], obj.__wrapped__)
        if isinstance(obj, Store):
            # All workers together load the store as one process would.
            streams = math.ceil(obj.limits.streams / self._workers)
            return Store, (replace(obj.limits, streams=streams),)
        return NotImplemented


def _cached(maxsize: int | None, function: Any) -> Any:
    return functools.lru_cache(maxsize)(function)


def _write(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
