"""The processes that share a run, as torchrun starts them; one alone needs none of it and gets no process group.

Ranks take equal parts of each global batch. Rank 0 prints, logs and evaluates. What is small (flags, counts, sample
ids) is exchanged over gloo between CPUs, so that it never waits for a GPU.
"""

import contextlib
import os
import socket
from collections.abc import Generator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

Value = TypeVar("Value")

# Longer than anything a run waits for: a rank that is gone is noticed by training.peers, which names it.
_COLLECTIVE_TIMEOUT = timedelta(days=7)


class AgreedError(ValueError):
    """What all ranks know of and end with; rank 0 says it."""


@dataclass(frozen=True)
class World:
    """This process among those of its run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def group(self) -> dist.ProcessGroup | None:
        """What collectives run in; None alone."""
        return dist.group.WORLD if self.size > 1 else None

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor added up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def totals(self, *numbers: float) -> list[float]:
        """Returns each number added up over the ranks, on every rank; waits for no GPU."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def of_first(self, value: Value) -> Value:
        """Returns rank 0's value of a small object, on every rank."""
        return self.each(value)[0]

    def each(self, value: Value) -> list[Value]:
        """Returns every rank's value of a small object, on every rank, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        # Pickled by torch, between processes of one run only.
        dist.all_gather_object(values, value)
        return values

    def rows(self, own: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Returns all ranks' numbers, [size * n], in the order of ranks, to rank 0; the others get their own, [n]."""
        if self.size == 1:
            return own
        parts = [torch.empty(len(own), dtype=torch.int64) for _ in range(self.size)] if self.is_first else None
        dist.gather(torch.from_numpy(own), parts, dst=0)
        return own if parts is None else torch.cat(parts).numpy()

    @contextlib.contextmanager
    def agreed(self) -> Generator[None]:
        """Raises AgreedError on every rank where any rank raises ValueError or OSError inside, so that all end alike.

        No collective may stand inside, unless all ranks come to it or none.
        """
        problem: ValueError | OSError | None = None
        try:
            yield
        except (ValueError, OSError) as error:
            problem = error
        if self.size == 1:
            if problem is not None:
                raise problem
            return
        phrases = self.each(None if problem is None else str(problem))
        found = next(((rank, phrase) for rank, phrase in enumerate(phrases) if phrase is not None), None)
        if found is not None:
            rank, phrase = found
            # What all ranks meet is no one's in particular.
            where = "" if all(other is not None for other in phrases) else f"rank {rank}: "
            raise AgreedError(where + phrase) from problem

    @contextlib.contextmanager
    def first_goes_ahead(self) -> Generator[None]:
        """Rank 0 does what stands inside, then the others do: what it makes for all is there when they come."""
        if not self.is_first:
            self.totals(0)
        try:
            yield
        finally:
            if self.is_first:
                self.totals(0)


def place() -> World:
    """Returns this process's place among those that torchrun started; one alone without it. Exchanges nothing."""
    # Some clusters set WORLD_SIZE for every job; torchrun sets all three.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "LOCAL_RANK"} <= os.environ.keys():
        return World()
    return World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


@contextlib.contextmanager
def first_speaks(world: World) -> Generator[None]:
    """Lets rank 0 alone print to standard output."""
    if world.is_first:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def attempt() -> int:
    """Returns how often torchrun (--max-restarts) has started these processes again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextlib.contextmanager
def joined(world: World, device: str) -> Generator[None]:
    """Connects the ranks: gloo between CPUs, and NCCL between GPUs, of which each rank takes the one of its number.

    Raises ValueError, on all ranks of a host, where it has more ranks than GPUs.
    """
    on_cuda = device == "cuda"
    if on_cuda:
        num_here = max(world.local_rank + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        if num_here > torch.cuda.device_count():
            raise ValueError(
                f"{socket.gethostname()} has {torch.cuda.device_count()} GPUs, too few for the {num_here} ranks on it; "
                "lower torchrun's --nproc-per-node"
            )
        torch.cuda.set_device(world.local_rank)
    if world.size == 1:
        yield
        return
    store, rank, size = next(rendezvous("env://", timeout=_COLLECTIVE_TIMEOUT))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
        # After a restart torchrun's store still holds the addresses of the ranks before.
        store=PrefixStore(f"attempt/{attempt()}", store),
        rank=rank,
        world_size=size,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    yield
    # Only here: with an error under way the others may never come to it.
    dist.destroy_process_group()
