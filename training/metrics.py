"""A run's logs: metrics.jsonl (one object a logged step), rejected.jsonl (each bad sample once), ledger.jsonl.

On resume every file is cut back to the checkpoint, so that a log never tells of steps that were lost.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.batch import Rejection

METRICS, REJECTED, LEDGER = "metrics.jsonl", "rejected.jsonl", "ledger.jsonl"


class RunLog:
    """Appends to the three files of a run; every line is whole when written."""

    def __init__(self, run: Path, step: int, seen_bad: Iterable[int] = ()) -> None:
        """Opens the logs of a run that has done `step` steps, dropping lines of later ones."""
        self.run = run
        self._reported = set(seen_bad)
        for name in (METRICS, REJECTED, LEDGER):
            _cut_back(run / name, step)

    def metrics(self, values: Mapping[str, Any]) -> None:
        self._append(METRICS, values)

    def ledger(self, step: int, sample_ids: npt.NDArray[np.int64]) -> None:
        self._append(LEDGER, {"step": step, "sample_ids": sample_ids.tolist()})

    def rejections(self, step: int, rejected: Iterable[Rejection]) -> int:
        """Writes the bad samples of a step that were not written before; returns how many."""
        fresh = [rejection for rejection in rejected if rejection.sample_id not in self._reported]
        for rejection in fresh:
            self._reported.add(rejection.sample_id)
            entry = {"shard": rejection.shard, "key": rejection.key, "reason": rejection.reason}
            self._append(REJECTED, {"step": step, "sample_id": rejection.sample_id, **entry})
        return len(fresh)

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        with (self.run / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(values, ensure_ascii=False) + "\n")


class StepTimer:
    """Adds up what the steps between two log lines took: the wait for data, and everything."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._begin = time.perf_counter()
        self._waited = 0.0
        self._paused = 0.0

    def waited(self, seconds: float) -> None:
        self._waited += seconds

    def paused(self, seconds: float) -> None:
        """Leaves time out that is not training: evaluation."""
        self._paused += seconds

    def rates(self, samples: int) -> dict[str, float]:
        """Returns images_per_s and data_wait_fraction since the last restart."""
        elapsed = max(time.perf_counter() - self._begin - self._paused, 1e-9)
        return {"images_per_s": samples / elapsed, "data_wait_fraction": self._waited / elapsed}


def ids_hash(sample_ids: npt.NDArray[np.int64]) -> str:
    """Returns 16 hex digits that stand for a step's sample ids, in order."""
    return hashlib.sha256(np.ascontiguousarray(sample_ids, "<i8").tobytes()).hexdigest()[:16]


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Returns the objects of a log; a last line that was cut off by a kill is left out."""
    if not path.exists():
        return []
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _cut_back(path: Path, step: int) -> None:
    kept = [entry for entry in read_jsonl(path) if entry["step"] <= step]
    if path.exists():
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in kept), encoding="utf-8")
        partial.replace(path)
