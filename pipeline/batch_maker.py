"""A worker process's side of the loader: messages in, batches into slots of a slab, answers out, as bytes.

What travels is a slot's number and what was found bad; the loader itself once, as a file in memory (see processes.py).
"""

import functools
import io
import math
import mmap
import pickle
import time
import traceback
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .batch import Rejection
from .slabs import Field, Slab
from .store import Store

if TYPE_CHECKING:
    from .loader import Loader

_LRU_CACHE = type(functools.lru_cache(len))


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


class BatchMaker:
    """The loader of a worker, which answers one message after the other."""

    def __init__(self, state: int, slab: int) -> None:
        """state, slab: descriptors of what the parent wrote, and of the slab. Raises what making a Loader raises."""
        from .loader import Loader

        with closing(mmap.mmap(state, 0, prot=mmap.PROT_READ)) as content:
            arguments, ranks, num_slots, self._end_step = pickle.loads(content)
        self._loader = Loader(*arguments, **ranks)
        self._slab = Slab(batch_fields(self._loader), num_slots, slab)
        self._answered = time.process_time()

    def answer(self, message: bytes) -> bytes:
        """Makes the batch that a Task asks for; returns a Done. Both pickled."""
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


def frozen(loader: "Loader", workers: int, num_slots: int, end_step: int) -> bytes:
    """Returns what a worker makes its loader of, to be written to the file `state` of a BatchMaker."""
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
