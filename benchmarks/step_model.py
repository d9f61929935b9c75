"""Our training step on cached batches, whole or part by part; whole it is what train.py's loop does.

Parts are told apart by marks between them (training/marks.py), which wait for no device inside a step.
"""

import copy
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from model.clip import CLIP
from model.loss import contrastive_loss
from model.presets import ModelConfig
from pipeline.batch import Batch
from pipeline.tokens import Geometry
from training import optim
from training.distributed import World
from training.health import Skips
from training.heap import keep_freed_memory
from training.marks import FORWARD, Marks, marked
from training.parallel import backward, over_ranks

CACHED_BATCHES = 4
_ALONE = World()


@dataclass(frozen=True)
class Turn:
    """What some steps cost."""

    images: int
    wall_s: float
    cpu_s: float

    @property
    def images_per_s(self) -> float:
        return self.images / self.wall_s

    @property
    def images_per_cpu_s(self) -> float:
        return self.images / self.cpu_s


class Stepper:
    """A model, its optimiser and cached batches; a step takes the next of them."""

    def __init__(
        self,
        config: ModelConfig,
        batches: Sequence[Batch],
        *,
        device: torch.device,
        precision: Literal["fp32", "bf16"] = "fp32",
        attention: str = "auto",
        compiled: bool = False,
    ) -> None:
        torch.manual_seed(0)
        self.device, self.precision, self.compiled = device, precision, compiled
        self.batches = list(batches)
        self.batch_size, text_tokens = batches[0].caption_ids.shape
        self.model = CLIP(config, grid=batches[0].grid, text_tokens=text_tokens, attention=attention).to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = optim.build(self.model, weight_decay=0.2, beta2=0.95, decayed=config.decayed)
        optim.set_learning_rate(self.optimizer, 1e-5)
        self._skips = Skips(device)
        self._turn = 0
        keep_freed_memory()

    def compiled_twin(self) -> "Stepper":
        """Returns the same model, optimiser and batches with torch.compile."""
        twin = copy.copy(self)
        twin.compiled, twin.forward = True, torch.compile(self.model)
        return twin

    def run(self, steps: int) -> Turn:
        """Takes whole steps, without marks."""
        self.synchronize()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(steps):
            self.step(self._next())
        self.synchronize()
        return Turn(steps * self.batch_size, time.perf_counter() - wall, time.process_time() - cpu)

    def run_parts(self, steps: int) -> list[dict[str, float]]:
        """Takes steps with marks; returns each step's parts in ms."""
        marks = Marks(self.device)
        with self.marked(marks):
            for _ in range(steps):
                marks.begin()
                self.step(self._next(), marks)
        return marks.milliseconds()

    def step(self, batch: Batch, marks: Marks | None = None) -> torch.Tensor:
        """Takes one step on a batch, as train.py does. Returns its loss, not yet waited for."""
        end = marks.end if marks else _no_mark
        batch = batch.to(self.device)
        end("copy")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            features = self.forward(batch.patches, batch.positions, batch.caption_ids)
        if self.compiled:
            end(FORWARD)
        loss = contrastive_loss(features, batch.valid, kind="infonce")
        end("loss")
        self.optimizer.zero_grad(set_to_none=True)
        backward(loss, self.model, _ALONE)
        end("backward")
        gradients = [weight.grad for weight in self.model.parameters() if weight.grad is not None]
        loss, norm = over_ranks(loss, gradients, _ALONE)
        left_out = self._skips.judge(loss, norm)
        end("gradient_reduction")
        if self.optimizer.param_groups[0]["fused"]:
            optim.step_unless(self.optimizer, left_out)
        else:
            self.optimizer.step()
        self.model.clamp_logit_scale()
        end("optimizer")
        return loss

    def peak_memory_bytes(self) -> int:
        """Returns the most that was ever in use: of the GPU's memory, or of the process's."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        # In kilobytes on Linux, in bytes on macOS.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def _next(self) -> Batch:
        self._turn += 1
        return self.batches[self._turn % len(self.batches)]

    def synchronize(self) -> None:
        """Waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def marked(self, marks: Marks) -> AbstractContextManager[None]:
        """Steps inside mark the parts of the forward, as far as it is not compiled."""
        return marked(self.model, marks.end, compiled=self.compiled)


def _no_mark(part: str) -> None:
    """Of a step that is taken whole."""


def made_batches(
    config: ModelConfig, geometry: Geometry, batch_size: int, text_tokens: int, count: int = CACHED_BATCHES
) -> list[Batch]:
    """Returns batches of random pixels and captions; of the kept places any of the grid, in rising order."""
    generator = torch.Generator().manual_seed(0)
    places = geometry.grid[0] * geometry.grid[1]
    found: list[Batch] = []
    for _ in range(count):
        kept = torch.rand(batch_size, places, generator=generator).argsort(dim=1)[:, : geometry.tokens].sort(dim=1)
        shape = (batch_size, geometry.tokens, config.image.patch_values)
        # The highest id once, at the end: it is what the BPE dialect pools at.
        ids = torch.randint(1, config.text.vocabulary - 1, (batch_size, text_tokens), generator=generator)
        ids[:, -1] = config.text.vocabulary - 1
        found.append(
            Batch(
                patches=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
                positions=kept.values.to(torch.int16),
                grid=geometry.grid,
                caption_ids=ids.to(torch.int32),
                valid=torch.ones(batch_size, dtype=torch.bool),
                sample_ids=torch.arange(batch_size),
            )
        )
    return found


def real_batches(
    config: ModelConfig,
    geometry: Geometry,
    batch_size: int,
    text_tokens: int,
    folder: Path,
    count: int = CACHED_BATCHES,
) -> list[Batch]:
    """Returns the first batches of a shard set. Raises ValueError for one that cannot be used."""
    # The rest of this module needs torch and NumPy alone, which is all that some machines with a GPU have.
    from pipeline.index import open_index
    from pipeline.loader import Loader, Settings
    from pipeline.order import Order, default_lanes

    index = open_index([folder])
    order = Order(index.shard_sizes, batch_size=batch_size, seed=0, lanes=default_lanes(batch_size))
    loader = Loader(index, order, Settings(geometry, text_tokens, "turbo", tokenizer=config.text.tokenizer))
    return [loader.batch(step) for step in range(count)]
