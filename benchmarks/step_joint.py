"""A loader and a model, which take their turns alone or joined as train.py joins them."""

import contextlib
import tempfile
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch.profiler import record_function

from model.presets import ModelConfig
from pipeline.batch import Batch
from pipeline.index import open_index
from pipeline.loader import DecoderName, Loader, Settings
from pipeline.order import Order, default_lanes
from pipeline.tokens import Geometry
from training import optim
from training.checkpoint_writer import CheckpointWriter
from training.marks import Marks
from training.metrics import RunLog
from training.trace import STEP, TracedLoader

from .step_model import CACHED_BATCHES, Stepper, Turn

if TYPE_CHECKING:
    from .end_to_end import EndToEnd


@dataclass(frozen=True)
class Joint:
    """What a joint turn gave."""

    turn: Turn
    parts: list[dict[str, float]]
    """Of each step, in ms."""


class LoaderAndModel:
    """A loader and a model, which take their turns alone or joined."""

    def __init__(self, config: "EndToEnd", encoders: ModelConfig, geometry: Geometry, decoder: DecoderName) -> None:
        self._config = config
        index = open_index([config.data])
        batch_size = config.batch_size
        order = Order(index.shard_sizes, batch_size=batch_size, seed=0, lanes=default_lanes(batch_size))
        device = torch.device(config.device)
        settings = Settings(
            geometry,
            config.text_tokens,
            decoder,
            tokenizer=encoders.text.tokenizer,
            device_id=0 if device.type == "cuda" else None,
        )
        self.loader: Loader = TracedLoader(index, order, settings)
        cached = [self.loader.batch(step) for step in range(CACHED_BATCHES)]
        self.stepper = Stepper(encoders, cached, device=device, precision=config.precision, compiled=config.compile)
        self._next = 0

    @contextlib.contextmanager
    def batches(self, steps: int, beyond: int = 0) -> Generator[Generator[Batch]]:
        """The next batches, of which the first was made already and is left out, as in the midst of a run.

        beyond: how many more than `steps` may be made, which nobody takes.
        """
        config = self._config
        first, self._next = self._next, self._next + steps + beyond + 1
        batches = self.loader.batches(first, self._next, threads=config.threads, prefetch=config.prefetch)
        with contextlib.closing(batches):
            next(batches)
            yield batches

    def load(self) -> Turn:
        """The loader alone."""
        with self.batches(self._config.steps) as batches:
            cpu, wall = time.process_time(), time.perf_counter()
            images = sum(len(batch.valid) for batch in batches)
            return Turn(images, time.perf_counter() - wall, time.process_time() - cpu)

    def join(self) -> Joint:
        """Both, as train.py joins them, from the end of one step to the end of another.

        A step is taken before the clock starts, and batches are made beyond the last: so the loader does in this time
        what it does in the midst of a run, neither idle under the last step nor ahead of the first.
        """
        config = self._config
        ahead = self.batches(config.steps + 1, beyond=config.prefetch + config.threads)
        with tempfile.TemporaryDirectory() as folder, ahead as batches:
            self.stepper.step(next(batches))
            self.stepper.synchronize()
            marks = Marks(self.stepper.device)
            run = Path(folder)
            log = RunLog(run, 0)
            with CheckpointWriter(run, keep=1) as writer, self.stepper.marked(marks):
                cpu, wall = time.process_time(), time.perf_counter()
                losses: list[torch.Tensor] = []
                for step in range(1, config.steps + 1):
                    with record_function(f"{STEP}{step}"):
                        marks.begin()
                        batch = next(batches)
                        marks.end("data_wait")
                        losses.append(self.stepper.step(batch, marks))
                        losses = self._log(log, step, batch, losses)
                        marks.end("logging")
                        self._save(writer, step)
                        marks.end("checkpoint")
                self.stepper.synchronize()
                turn = Turn(
                    config.steps * config.batch_size,
                    time.perf_counter() - wall,
                    time.process_time() - cpu,
                )
        self._marks = marks
        return Joint(turn, marks.milliseconds())

    def _log(self, log: RunLog, step: int, batch: Batch, losses: list[torch.Tensor]) -> list[torch.Tensor]:
        """Every step's sample ids, and every so many steps a line; reading the losses waits for the device."""
        log.step(step, batch.sample_ids.numpy(), batch.rejected)
        if step % self._config.log_every:
            return losses
        recent = torch.stack(losses).tolist()
        log.metrics({"step": step, "loss": sum(recent) / len(recent)})
        return []

    def _save(self, writer: CheckpointWriter, step: int) -> None:
        if self._config.checkpoint_every and step % self._config.checkpoint_every == 0:
            model, optimizer = self.stepper.model, self.stepper.optimizer
            writer.save(step, model.state_dict(), optim.state_tensors(model, optimizer), {"samples_seen": step})

    def joined_marks(self) -> list[list[tuple[str, float]]]:
        """Both once more; returns the marks of their steps, as `write_trace` takes them."""
        self.join()
        return self._marks.seconds()
