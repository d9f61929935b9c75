"""A run's logs: metrics.jsonl (one object a logged step), rejected.jsonl (each bad sample once), ledger.jsonl.

On resume every file is cut back to the checkpoint, so that a log never tells of steps that were lost.
"""

import hashlib
import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.batch import Rejection
from pipeline.files import write_text

from .reporters import Reporters

METRICS, REJECTED, LEDGER = "metrics.jsonl", "rejected.jsonl", "ledger.jsonl"


class RunLog:
    """Appends to the files of a run; every line is whole when written. Rank 0 has it, for all ranks."""

    def __init__(self, run: Path, step: int, *, with_ids: bool = False, reporters: Reporters | None = None) -> None:
        """Opens the logs of a run that has done `step` steps, dropping lines of later ones.

        with_ids: write every step's sample ids, beside their hash. reporters: who gets the metrics too.
        """
        self.run, self._with_ids, self._reporters = run, with_ids, reporters
        self._hashes: list[str] = []
        for name in (METRICS, REJECTED, LEDGER):
            _cut_back(run / name, step)
        self._reported: set[int] = {entry["sample_id"] for entry in read_jsonl(run / REJECTED)}

    @property
    def num_rejected(self) -> int:
        """How many samples rejected.jsonl names."""
        return len(self._reported)

    def metrics(self, values: Mapping[str, Any]) -> None:
        """Writes a logged step's values, with the hashes of the steps since the last one."""
        self._append(METRICS, {**values, "ledger": self._hashes})
        self._hashes = []
        if self._reporters is not None:
            self._reporters.log(values, values["step"])

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *error: object) -> None:
        if self._reporters is not None:
            self._reporters.close()

    def step(self, step: int, sample_ids: npt.NDArray[np.int64], rejected: Iterable[Rejection]) -> None:
        """Takes in a step's global batch: its sample ids, and those of its samples that are bad.

        Writes the bad ones that were not written before.
        """
        self._hashes.append(ids_hash(sample_ids))
        if self._with_ids:
            self._append(LEDGER, {"step": step, "sample_ids": sample_ids.tolist()})
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


def log_line(values: Mapping[str, Any], total_steps: int) -> str:
    """Returns a logged step's values as one plain line that survives a log file."""
    left = (total_steps - values["step"]) * values["samples_seen"] / values["step"] / values["images_per_s"]
    parts = [
        f"step {values['step']}/{total_steps}",
        f"loss {values['loss']:.3f}",
        f"scale {values['logit_scale']:.1f}",
        f"{values['images_per_s']:,.0f} img/s",
        f"{values['tokens_per_s']:,.0f} tokens/s",
        f"wait {values['data_wait_fraction']:.1%}",
        f"mem {values['memory_gib']:.1f} GiB",
        f"eta {left / 3600:.1f}h" if left >= 36_000 else f"eta {left / 60:.0f}m" if left >= 60 else f"eta {left:.0f}s",
    ]
    if values["mfu"] is not None:
        parts.insert(6, f"mfu {values['mfu']:.0%}")
    if values["rejected"]:
        parts.append(f"bad samples {values['rejected']}")
    if values["skipped_steps"]:
        parts.append(f"skipped steps {values['skipped_steps']}")
    if "zero_shot_top1" in values:
        parts.append(f"zero-shot {values['zero_shot_top1']:.1%}")
    return "  ".join(parts)


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
