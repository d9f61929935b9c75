"""A run's logs: metrics.jsonl (one object a logged step), rejected.jsonl (each bad sample once), ledger.jsonl.

On resume every file is cut back to the checkpoint, so that a log never tells of steps that were lost.
"""

import hashlib
import json
import math
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.batch import Rejection
from pipeline.files import write_text

METRICS, REJECTED, LEDGER = "metrics.jsonl", "rejected.jsonl", "ledger.jsonl"


class RunLog:
    """Appends to the three files of a run; every line is whole when written."""

    def __init__(self, run: Path, step: int) -> None:
        """Opens the logs of a run that has done `step` steps, dropping lines of later ones."""
        self.run = run
        for name in (METRICS, REJECTED, LEDGER):
            _cut_back(run / name, step)
        self._reported: set[int] = {entry["sample_id"] for entry in read_jsonl(run / REJECTED)}

    @property
    def num_rejected(self) -> int:
        """How many samples rejected.jsonl names."""
        return len(self._reported)

    def metrics(self, values: Mapping[str, Any]) -> None:
        self._append(METRICS, values)

    def ledger(self, step: int, sample_ids: npt.NDArray[np.int64]) -> None:
        self._append(LEDGER, {"step": step, "sample_ids": sample_ids.tolist()})

    def rejections(self, step: int, rejected: Iterable[Rejection]) -> None:
        """Writes the bad samples of a step that were not written before."""
        for rejection in rejected:
            if rejection.sample_id not in self._reported:
                self._reported.add(rejection.sample_id)
                entry = {"shard": rejection.shard, "key": rejection.key, "reason": rejection.reason}
                self._append(REJECTED, {"step": step, "sample_id": rejection.sample_id, **entry})

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with (self.run / name).open("a", encoding="utf-8") as file:
            # A loss that is no number is null: NaN is not JSON.
            finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                      for key, value in values.items()}  # fmt: skip
            file.write(json.dumps(finite, ensure_ascii=False) + "\n")


class StepTimer:
    """Adds up what the steps between two log lines took: the wait for data, and everything."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def rates(self, samples: int) -> dict[str, float]:
        """Returns images_per_s and data_wait_fraction since the last restart."""
        elapsed = max(time.perf_counter() - self._begin, 1e-9)
        return {"images_per_s": samples / elapsed, "data_wait_fraction": self._waited / elapsed}


class BadSampleBudget:
    """Stops a run whose share of bad samples, over the last 10,000 slots, is above a limit."""

    def __init__(self, limit: float, window: int = 10_000, least: int = 2_000) -> None:
        """limit: share, 0 to 1. least: slots to have seen before judging."""
        self._limit, self._window, self._least = limit, window, least
        self._recent: deque[tuple[int, tuple[Rejection, ...]]] = deque()
        self._slots = self._bad = 0

    def add(self, slots: int, rejected: tuple[Rejection, ...]) -> None:
        """Takes in a batch. Raises ValueError, naming the worst shard, when the limit is passed."""
        self._recent.append((slots, rejected))
        self._slots += slots
        self._bad += len(rejected)
        while self._slots - self._recent[0][0] >= self._window:
            old_slots, old_rejected = self._recent.popleft()
            self._slots -= old_slots
            self._bad -= len(old_rejected)
        if self._slots >= self._least and self._bad > self._limit * self._slots:
            shards = Counter(rejection.shard for _, each in self._recent for rejection in each)
            shard, count = shards.most_common(1)[0]
            raise ValueError(
                f"{self._bad:,} of the last {self._slots:,} samples were bad, over --max-bad-fraction {self._limit:g}; "
                f"{count:,} of them in {shard}: mend or remove it (rejected.jsonl names each)"
            )


def ids_hash(sample_ids: npt.NDArray[np.int64]) -> str:
    """Returns 16 hex digits that stand for a step's sample ids, in order."""
    return hashlib.sha256(np.ascontiguousarray(sample_ids, "<i8").tobytes()).hexdigest()[:16]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a log; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    # Not splitlines: it also cuts at U+2028, which a key may hold.
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _cut_back(path: Path, step: int) -> None:
    kept = [entry for entry in read_jsonl(path) if entry["step"] <= step]
    if path.exists():
        write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept))
