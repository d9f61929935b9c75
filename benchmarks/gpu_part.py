"""What a part of gpu_check is given, and how it answers: rows as they are found, a failure, or why it was skipped.

Nothing but Python is needed here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Value = str | int | float | bool | None
Row = dict[str, Value]


class Skipped(Exception):
    """A part cannot be done on this machine; the message says why."""


@dataclass
class Context:
    """A part's device, size and time, and the place for what it finds."""

    device: "torch.device"
    quick: bool
    """Sizes so small that a CPU does them in seconds."""
    until: float
    """When the part must be done, by time.monotonic."""
    say: Callable[[Row], None]
    """Takes each row as it is found, so that what a part had found before it died is kept."""
    data: Path | None = None
    """A folder of shards; None: the starter, or made ones where that is not there."""
    failures: list[str] = field(default_factory=list[str])
    cut_short: str | None = None
    """What was left out for lack of time."""

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def seconds_left(self) -> float:
        return self.until - time.monotonic()

    @property
    def dtype(self) -> "torch.dtype":
        """What the device computes in: bf16 on a GPU, float32 on a CPU."""
        import torch

        return torch.bfloat16 if self.on_gpu else torch.float32

    def row(self, **values: Value) -> None:
        self.say(values)

    def judge(self, passed: bool, what: str) -> str:
        """Returns the word for a row, and keeps `what` as a failure where it did not pass."""
        if not passed:
            self.failures.append(what)
        return "passed" if passed else "FAILED"

    def enough_time(self, seconds: float, left_out: str) -> bool:
        """Returns whether so many seconds are left; where not, `left_out` names what is not done for it."""
        if self.seconds_left >= seconds:
            return True
        self.cut_short = self.cut_short or left_out
        return False
