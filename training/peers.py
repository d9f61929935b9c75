"""Tells when a rank is dead or hangs, says which, and ends this process: a collective alone would wait for ever.

A thread of each rank writes a sign of life into the store that torchrun keeps, twice a second. Rank 0 reads those of
all ranks, the others that of rank 0 and what rank 0 has found. The ranks that are left end, with exit code 3,

* within about 5 seconds where a rank of rank 0's host died, or where a rank ended by itself and said why;
* within --peer-timeout (60 s) and 5 seconds where a rank gives no sign of life: its host is gone, or it was stopped;
* within 5 times that where all processes live and yet no step is done. Starting, evaluating and saving may take longer.

Rank 0 prints one line that names the rank, or, where it is rank 0 that is lost, another rank does. torchrun then starts
all ranks again if --max-restarts tells it to.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Generator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

from .distributed import AgreedError, World, attempt

PEER_LOST = 3
"""Exit code of the ranks that are left where another one was lost."""
HANGS = 5
"""Times --peer-timeout that a run may stand still."""
_BEAT_S = 0.5


@contextlib.contextmanager
def watched(world: World, timeout_s: float) -> Generator["Peers"]:
    """Gives the watch over the other ranks. What ends this rank inside is told to them, so that they end too."""
    peers = Peers(world, timeout_s)
    try:
        yield peers
    except AgreedError:
        peers.leave(None)
        raise
    except BaseException as error:
        if _is_failed_exchange(error):
            peers.explain()
        peers.leave(f"{type(error).__name__}: {error}")
        raise
    peers.leave(None)


class Peers:
    """The watch. `at` says where this rank is, `leave` that it ends, `explain` waits for who is lost."""

    def __init__(self, world: World, timeout_s: float) -> None:
        """Raises ValueError where torchrun's store cannot be reached. Alone there is nothing to watch."""
        self._world, self._timeout_s = world, timeout_s
        self._at: dict[str, Any] = {"mark": 0, "doing": "starting", "patient": True}
        self._left: str | None = None
        self._seen: dict[int, tuple[str, float]] = {}
        """Of each rank the last sign of life and when it came."""
        self._moved = (0, time.monotonic())
        self._closed = threading.Event()
        if world.size == 1:
            return
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        try:
            # A client of its own: one that waits for an answer would keep the process group from the store.
            client = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise ValueError(f"torchrun's store at {host}:{port} cannot be reached ({error})") from None
        self._store = PrefixStore(f"peers/{attempt()}", client)
        self._process = {"host": socket.gethostname(), "pid": os.getpid(), "pids": _pid_namespace()}
        self._beat(0)
        world.totals(0)  # no one reads before all have written
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def at(self, step: int, doing: str, *, patient: bool = False) -> None:
        """Says what this rank does at a step. patient: it may take as long as it needs, while its process lives."""
        self._at = {"mark": self._at["mark"] + 1, "doing": f"step {step:,}, {doing}", "patient": patient}

    def leave(self, why: str | None) -> None:
        """Says that this rank ends, and why; None for an end that all ranks come to."""
        if self._world.size > 1 and not self._closed.is_set():
            self._left = why or ""
            self._closed.set()
            self._thread.join(timeout=5)

    def explain(self) -> None:
        """Called when an exchange failed: waits until the watch knows who is lost, which ends this process.

        Returns if nobody is.
        """
        if self._world.size > 1:
            self._closed.wait(self._timeout_s + 5)

    def _beat(self, count: int) -> None:
        said = {**self._process, **self._at, "beat": count, "left": self._left}
        self._store.set(f"rank/{self._world.rank}", json.dumps(said))

    def _watch(self) -> None:
        count, before = 0, time.monotonic()
        try:
            while not self._closed.wait(_BEAT_S):
                count += 1
                self._beat(count)
                now = time.monotonic()
                if now - before > 10 * _BEAT_S:
                    # This process was stopped itself, and perhaps all were: they have their time again.
                    self._seen.clear()
                    self._moved = (0, now)
                before = now
                if self._world.is_first:
                    self._look_at_all(now)
                else:
                    self._look_at_first(now)
            self._beat(count + 1)
        except RuntimeError:  # of the store
            if not self._closed.is_set():
                self._end("torchrun's store is gone, and with it the process that started the ranks")

    def _look_at_all(self, now: float) -> None:
        said = self._read(range(1, self._world.size))
        for rank, each in said.items():
            if each["left"]:
                self._end(None)  # it has printed why
            elif why := self._lost(rank, each, now):
                self._store.set("lost", "1")
                self._end(f"lost rank {rank}: {why}")
        mark, since = self._moved
        if mark != self._at["mark"]:
            self._moved = (self._at["mark"], now)
        elif now - since > HANGS * self._timeout_s and not any(each["patient"] for each in (self._at, *said.values())):
            behind = min(each["mark"] for each in said.values())
            last = [rank for rank, each in said.items() if each["mark"] == behind] if behind < self._at["mark"] else [0]
            what = said[last[0]]["doing"] if last[0] else self._at["doing"]
            self._store.set("lost", "1")
            self._end(f"lost rank {', '.join(map(str, last))}: nothing moved for {now - since:.0f} s ({what})")

    def _look_at_first(self, now: float) -> None:
        first = self._read([0])[0]
        if self._store.check(["lost"]) or first["left"]:
            self._end(None)
        elif why := self._lost(0, first, now):
            # Whoever sees it first says so.
            self._end(f"lost rank 0: {why}" if self._store.add("speakers", 1) == 1 else None)

    def _read(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        values = self._store.multi_get([f"rank/{rank}" for rank in ranks])
        return {rank: json.loads(value) for rank, value in zip(ranks, values, strict=True)}

    def _lost(self, rank: int, said: dict[str, Any], now: float) -> str | None:
        """Returns why a rank is lost, or None."""
        if said["left"] is not None:
            return None
        if said["pids"] is not None and said["pids"] == self._process["pids"] and not _lives(said["pid"]):
            return f"its process {said['pid']} died ({said['doing']})"
        sign, since = self._seen.get(rank, ("", now))
        if sign != str(said["beat"]):
            self._seen[rank] = (str(said["beat"]), now)
            return None
        if now - since > self._timeout_s:
            return (
                f"no sign of life for {now - since:.0f} s from {said['host']}, process {said['pid']} ({said['doing']})"
            )
        return None

    def _end(self, line: str | None) -> None:
        """Ends the process from this thread: the main one may be in an exchange that never returns."""
        if self._closed.is_set():
            return
        if line is not None:
            print(f"error: {line}; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        if self._world.is_first:
            # The store may be gone with torchrun, which ends when its first process does: let the others read it.
            time.sleep(4 * _BEAT_S)
        os._exit(PEER_LOST)


def _pid_namespace() -> str | None:
    """Returns what two processes share that see each other by number; hosts and containers may bear one name. None
    where there is no telling."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return None


def _lives(pid: int) -> bool:
    """Whether a process that this one sees runs; one that has died and was not collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _is_failed_exchange(error: BaseException) -> bool:
    """Whether an error comes from a collective, as it does on all ranks when one of them dies. gloo's has no type."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
