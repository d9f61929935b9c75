"""Steps in, ready batches out, in order, made by worker processes: the GIL of this one is left to the training.

A batch is a pure function of its step, so any worker may make any, and what a killed one was making is made again.
Only a slot's number and what was found bad travel between processes (about 100 us of the GIL a batch); pixels are
written into shared memory once. Nothing outlives the processes, however they end: no file, no name, no semaphore.
"""

import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Generator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .batch import Batch
from .batch_maker import Done, Task, batch_fields, frozen
from .slabs import Slab, memory_file
from .workers import ctrl_c_blocked

if TYPE_CHECKING:
    from .loader import Loader

MAX_DEATHS = 3
"""Workers that may die within DEATH_WINDOW batches; each is replaced."""
DEATH_WINDOW = 1000
HANG_S = 600.0
"""Without any worker's answer while a batch is waited for, after which the one that makes it is ended and replaced: far
more than a slow store's shard takes."""
_LENT = 2
"""Batches that the consumer has at a time: the one in its hands, and the one before, which goes as it takes the new."""


class WorkerDied(ValueError):
    """Workers of the loader die faster than replacing them makes sense."""


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
        _write(self._state, frozen(loader, workers, num_slots, end_step))
        self._workers: dict[int, _Worker] = {}
        """By number."""
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
                self._start(number)
            yield self
        finally:
            self._end()

    def hand_out(self, step: int) -> int:
        """Gives a step to the worker that has least to do. Returns the slot."""
        self._receive(0)
        used = self.taken | self.slab.lent()
        slot = next(slot for slot in range(self.slab.num_slots) if slot not in used)
        self.taken.add(slot)
        worker = min(self._workers.values(), key=lambda worker: len(worker.tasks))
        worker.tasks.append((step, slot))
        self._send(worker, step, slot)
        return slot

    def result(self, step: int) -> Done:
        """Waits until a step's batch is in its slot. Raises what making it raised."""
        while step not in self._done:
            if not self._receive(HANG_S):
                workers = self._workers.values()
                self._replace(next(each for each in workers if step in dict(each.tasks)), hangs=True)
        done = self._done.pop(step)
        # Here, not as answers come: what a batch cost is counted when it is taken, however early it was made.
        for stage, seconds in done.stage_seconds.items():
            self.loader.stage_seconds[stage] += seconds
        self.loader.worker_seconds += done.cpu_seconds
        if done.error is not None:
            raise done.error
        return done

    def _start(self, number: int) -> None:
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
            # Inside: a Ctrl-C that waited finds a worker that will be ended.
            self._workers[number] = _Worker(number, process, ours)

    def _send(self, worker: _Worker, step: int, slot: int) -> None:
        news = dict(islice(self.loader.known_bad.items(), worker.told, None))
        worker.told += len(news)
        # A worker that is gone is found, and replaced, where answers are received.
        with suppress(BrokenPipeError, ConnectionResetError):
            worker.connection.send(Task(step, slot, news))

    def _receive(self, timeout: float) -> bool:
        """Returns whether any answer came, and takes those in; waits for one at least, up to `timeout` seconds."""
        ready = wait([worker.connection for worker in self._workers.values()], timeout)
        for worker in [worker for worker in self._workers.values() if worker.connection in ready]:
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
        return bool(ready)

    def _replace(self, worker: _Worker, *, hangs: bool = False) -> None:
        worker.connection.close()
        worker.process.kill()  # it may have closed its socket and live on
        status = -signal.SIGKILL
        with suppress(subprocess.TimeoutExpired):  # one that waits for a disk that is gone ends when the disk is back
            status = worker.process.wait(timeout=30)
        how = f"was killed by {_signal_name(-status)}" if status < 0 else f"ended with status {status}"
        if hangs:
            how = f"gave no answer for {HANG_S:.0f} s"
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
        self._start(worker.number)
        fresh = self._workers[worker.number]
        fresh.tasks = worker.tasks
        for step, slot in fresh.tasks:
            self._send(fresh, step, slot)

    def _end(self) -> None:
        # Closing alone would end them, and does where this is interrupted; they have nothing to put in order.
        for worker in self._workers.values():
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.wait()
        os.close(self._state)
        self.slab.close()


def _write(descriptor: int, content: bytes) -> None:
    with open(descriptor, "wb", closefd=False) as file:
        file.write(content)


def _signal_name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return f"signal {number}"
