"""What keeps a run from going wrong unseen: steps without a number are left out and counted, odd ones are told of."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from pipeline.files import write_text

if TYPE_CHECKING:  # the step's benchmark runs where the loader's libraries are missing
    from pipeline.loader import Loader

NON_FINITE_LIMIT = 20
"""Steps left out in a row after which the run stops."""
NON_FINITE = "non_finite.jsonl"
"""Names the samples of the batch at which it stopped."""
DATA_WAIT_LIMIT = 0.10
"""Share of the time between two log lines that may go into waiting for data."""
SPIKE_DEVIATIONS = 6.0
"""A loss that is so many standard deviations above those before it, and a tenth of their mean, is a spike."""
_MEMORY = 0.98
_LEAST = 100


class Skips:
    """Counts steps that are left out because a loss or gradient is not finite. On the device: it waits for nothing."""

    def __init__(self, device: torch.device, skipped: int = 0) -> None:
        self._counts = torch.tensor([skipped, 0], dtype=torch.int64, device=device)

    def judge(self, *numbers: torch.Tensor) -> torch.Tensor:
        """Returns float32 1 if one of the step's numbers, the same on all ranks, is not finite, else 0."""
        bad = ~torch.stack([torch.isfinite(number).all() for number in numbers]).all()
        self._counts[0] += bad
        self._counts[1] = (self._counts[1] + 1) * bad
        return bad.to(torch.float32)

    def read(self) -> tuple[int, int]:
        """Returns how many steps were left out, in all and up to the newest without a break. Waits for the device."""
        skipped, in_a_row = self._counts.tolist()
        return skipped, in_a_row


def non_finite_run(step: int, run: Path, loader: "Loader", sample_ids: npt.NDArray[np.int64]) -> str:
    """Writes the samples of a batch, by shard and key, to the run folder. Returns the line to stop the run with."""
    rows = loader.reader.locate_ids(sample_ids)
    shards = loader.index.shards
    firsts = loader.index.first_ids[rows.shard]
    names = [
        {"sample_id": sample, "shard": shards[shard].path, "key": loader.reader.key(shard, sample - first)}
        for sample, shard, first in zip(sample_ids.tolist(), rows.shard.tolist(), firsts.tolist(), strict=True)
    ]
    write_text(run / NON_FINITE, "".join(json.dumps(name, ensure_ascii=False) + "\n" for name in names))
    return (
        f"the loss or a gradient was not finite for {NON_FINITE_LIMIT} steps up to step {step:,}; the last batch is "
        f"{names[0]['key']} in {names[0]['shard']} and {len(names) - 1:,} more, all named in {run / NON_FINITE}. "
        "No checkpoint holds these steps: train again with a lower --lr, or --grad-clip 1, in a new --out"
    )


def out_of_memory(error: torch.OutOfMemoryError, rank: int) -> str:
    """Returns the line to stop a run with whose step does not fit a GPU."""
    return (
        f"rank {rank}: {str(error).partition('. ')[0]}; give --grad-checkpointing, a larger --accumulate, or --shard, "
        "with which the run goes on from its last checkpoint; or a smaller --batch-size, in a new --out"
    )


class Advice:
    """Says what to do about a spike of the loss or a wait for data, to standard error, each once in a run."""

    def __init__(self) -> None:
        self._said: set[str] = set()
        self._lines = 0
        self._seen, self._mean, self._variance = 0, 0.0, 0.0

    def losses(self, step: int, losses: Sequence[float]) -> None:
        """Takes in the newest steps' losses; `step` is that of the last."""
        for number, loss in enumerate(losses, step - len(losses) + 1):
            if not math.isfinite(loss):
                continue
            over = loss - self._mean
            if self._seen >= _LEAST and over > max(SPIKE_DEVIATIONS * math.sqrt(self._variance), 0.1 * self._mean):
                self._say(
                    "spike",
                    f"the loss rose to {loss:.3f} at step {number:,}, from {self._mean:.3f} on average before; if it "
                    "stays there, train again with a lower --lr, or with --grad-clip 1, in a new --out",
                )
            # An average over all at first, then over about the last fifty.
            share = max(1 - _MEMORY, 1 / (self._seen + 1))
            self._mean += share * over
            self._variance = (1 - share) * (self._variance + share * over * over)
            self._seen += 1

    def data_wait(self, step: int, fraction: float) -> None:
        """fraction: of the time up to `step` since the log line before. The first is not judged: nothing was ready."""
        self._lines += 1
        if self._lines > 1 and fraction > DATA_WAIT_LIMIT:
            self._say(
                "wait",
                f"{fraction:.0%} of the time up to step {step:,} went into waiting for data; raise --threads (and the "
                "cores beside them), or make small copies of the shards: python ingest.py shrink",
            )

    def _say(self, kind: str, line: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            print(f"warning: {line}", file=sys.stderr, flush=True)
