"""When each part of a training step ends, told by marks between the parts, in a run (profile.py) and in benchmarks.

A monotonic clock on a CPU; on a GPU events as well, read when all steps are done, so that nothing waits inside a step.
"""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from model.clip import CLIP

PARTS = ("copy", "embed", "image_forward", "text_forward", "loss", "backward", "gradient_reduction", "optimizer")
"""Of a step. copy: to the device. embed: normalise and embed the patches. gradient_reduction: the gradients' norm and
whether it is a number, over all ranks; DDP and FSDP2 exchange the gradients themselves during `backward`."""
FORWARD = "forward"
"""In place of embed, image_forward and text_forward where the model is compiled, as one."""


class Marks:
    """When each part of each step ended. Clocks of a GPU are read in `milliseconds` alone."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._steps: list[list[tuple[str, Any]]] = []
        self._host: list[list[tuple[str, float]]] = []

    def begin(self) -> None:
        self._steps.append([])
        self._host.append([])
        self.end("")

    def end(self, part: str) -> None:
        """Says that a part ends here, and what follows begins. A part may come several times in a step."""
        now = time.perf_counter()
        self._host[-1].append((part, now))
        self._steps[-1].append((part, self._event() if self._on_gpu else now))

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[list[tuple[str, float]]]:
        """Returns for each step when it began ("") and when each part ended, by the host's monotonic clock."""
        return self._host

    def milliseconds(self) -> list[dict[str, float]]:
        """Returns each step's parts in ms; waits for the device. On a GPU they are what its own work took."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [_parts(step, _between_events if self._on_gpu else _between) for step in self._steps]

    def host_milliseconds(self) -> list[dict[str, float]]:
        """Returns what each part kept the host busy: on a GPU, to queue its work."""
        return [_parts(step, _between) for step in self._host]


def _between(before: float, after: float) -> float:
    return 1e3 * (after - before)


def _between_events(before: torch.cuda.Event, after: torch.cuda.Event) -> float:
    return before.elapsed_time(after)


def _parts(step: Sequence[tuple[str, Any]], between: Callable[[Any, Any], float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for (_, before), (part, after) in pairwise(step):
        found[part] = found.get(part, 0.0) + between(before, after)
    return found


@contextlib.contextmanager
def marked(model: CLIP, end: Callable[[str], None], *, compiled: bool) -> Generator[None]:
    """Lets forward passes inside mark their parts. compiled: none can, since a hook would cut the graph.

    They end before the image tower's first block, after the tower, and after the text tower. What makes features
    of unit length counts to the part that follows: under 0.1 % of a step.
    """
    if compiled:
        yield
        return

    def mark(part: str, *_: Any) -> None:
        end(part)

    hooks = [
        model.image.blocks[0].register_forward_pre_hook(partial(mark, "embed")),
        model.image.register_forward_hook(partial(mark, "image_forward")),
        model.text.register_forward_hook(partial(mark, "text_forward")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
