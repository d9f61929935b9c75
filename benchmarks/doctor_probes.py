"""The doctor's probes: each measures one thing for a second or two, on the data and with the flags of the run."""

import contextlib
import os
import resource
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch

from model.presets import ModelConfig
from pipeline.batch import Batch
from pipeline.index import Index
from pipeline.ingest.picture import Unusable, copy_picture
from pipeline.loader import DecoderName, Loader, Settings
from pipeline.mixture import Mixture
from pipeline.order import Order
from pipeline.plan import crop_windows, decoded_windows, kept_positions
from training.config import Config

from .step_model import Stepper

_SHRUNK_SIDES = (64, 96, 128, 160, 192, 256, 320, 384, 448, 512)
_SAMPLED = 64


@dataclass(frozen=True)
class LoaderFound:
    """A decoder's loader alone, images a second; and what an image costs by stage, in us of CPU time."""

    rate: float
    per_cpu_s: float
    stages_us: dict[str, float]


@dataclass(frozen=True)
class Sampled:
    """Some of the images."""

    jpegs: list[bytes]
    sample_ids: Any
    widths: Any
    heights: Any
    image_bytes: float
    short_side: float


@dataclass(frozen=True)
class Shrunk:
    """Copies with a short side of `side`: their mean size, and the loader's rate with them by CPU time."""

    side: int
    image_bytes: float
    per_cpu_s: float


@dataclass(frozen=True)
class StepFound:
    """The model alone at a batch and, on a GPU, at twice that (None where that did not fit, or on a CPU)."""

    stepper: Stepper
    batch_size: int
    rate: float
    per_cpu_s: float
    doubled_rate: float | None
    memory_gib: float
    doubled_memory_gib: float | None

    def needed_gib(self, batch_size: int) -> float | None:
        """Memory grows along a line with the batch, where the loss is computed in blocks or is small beside it."""
        if self.doubled_memory_gib is None:
            return None if batch_size > self.batch_size or self.doubled_rate is None else self.memory_gib
        slope = (self.doubled_memory_gib - self.memory_gib) / self.batch_size
        return self.memory_gib + slope * (batch_size - self.batch_size)


class Bench:
    """The probes of one data set and config, and what they met of bad samples."""

    def __init__(
        self, config: Config, index: Index, order: Order | Mixture, settings: Settings, notes: list[str]
    ) -> None:
        self.config, self.index, self.order, self.settings, self.notes = config, index, order, settings, notes
        self.bad, self.seen = 0, 0
        self.rejected: list[str] = []
        self._loaders: dict[str, Loader] = {}

    def storage(self, seconds: float) -> float | None:
        """MB/s of the reads of batches, by one thread; what the page cache holds of the shards is dropped before."""
        if self.index.remote:
            return None
        for shard in self.index.shards:
            with contextlib.suppress(OSError), open(shard.path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader = self._loader(self.settings.decoder).reader
        # Far from the steps of the other probes.
        size, step, begin = 0, 100_000, time.perf_counter()
        while size == 0 or time.perf_counter() - begin < seconds:
            rows = reader.locate(self.order.slots(step))
            size += sum(len(each) for each in reader.images(rows))
            step += 1
        return size / (time.perf_counter() - begin) / 1e6

    def loader(self, decoder: DecoderName, seconds: float) -> LoaderFound | None:
        """The loader alone, as the config has it; None where the library of that decoder is missing."""
        try:
            loader = self._loader(decoder)
        except ValueError as error:
            self.notes.append(f"not probed: {error}")
            return None
        with contextlib.closing(self._batches(loader, 0)) as batches:
            for _ in range(self._ahead() + 1):
                self._count(next(batches))
            stages_before, workers_before = dict(loader.stage_seconds), loader.worker_seconds
            images, cpu, begin = 0, time.process_time(), time.perf_counter()
            while images == 0 or time.perf_counter() - begin < seconds:
                images += self._count(next(batches))
            wall_s = time.perf_counter() - begin
            cpu_s = time.process_time() - cpu + loader.worker_seconds - workers_before
        stages = {name: loader.stage_seconds[name] - stages_before[name] for name in stages_before}
        if decoder == "dali" and self.settings.device_id is None:
            stages["decode"] += max(0.0, cpu_s - sum(stages.values()))  # on threads of DALI's own
        return LoaderFound(
            images / wall_s,
            images / max(cpu_s, 1e-9),
            {name: spent / images * 1e6 for name, spent in stages.items()},
        )

    def sample(self) -> Sampled:
        """Some images of a batch, and what is typical of it."""
        reader = self._loader(self.settings.decoder).reader
        rows = reader.locate(self.order.slots(0))
        images = reader.images(rows)
        kept = [slot for slot, image in enumerate(images) if isinstance(image, bytes)][:_SAMPLED]
        sides = np.minimum(rows.width, rows.height)
        return Sampled(
            [image for slot in kept if isinstance(image := images[slot], bytes)],
            rows.sample_ids[kept],
            rows.width[kept],
            rows.height[kept],
            float(rows.image_bytes.mean()),
            float(np.median(sides)),
        )

    def shrunk(self, sampled: Sampled, own: LoaderFound) -> Shrunk | None:
        """What copies with the smallest sufficient short side would give, from some made here in memory."""
        wanted = 1.25 * self.settings.geometry.image_size
        side = next((side for side in _SHRUNK_SIDES if side >= wanted), None)
        if side is None or sampled.short_side < 1.3 * side or not sampled.jpegs:
            return None
        copies: list[bytes] = []
        sizes: list[tuple[int, int]] = []
        slots: list[int] = []
        for slot, jpeg in enumerate(sampled.jpegs):
            with contextlib.suppress(Unusable):
                copy, about = copy_picture(jpeg, side, 90)
                copies.append(copy)
                sizes.append((about.width, about.height))
                slots.append(slot)
        if not copies:
            return None
        ids = sampled.sample_ids[slots]
        widths, heights = np.array(sizes, np.int32).T.copy()
        originals = [sampled.jpegs[slot] for slot in slots]
        before = self._decode_seconds(originals, ids, sampled.widths[slots], sampled.heights[slots])
        after = self._decode_seconds(copies, ids, widths, heights)
        total_us = 1e6 / own.per_cpu_s
        # A share of the whole: batches in flight make the stages' sum differ from it.
        decode_us = total_us * own.stages_us["decode"] / max(sum(own.stages_us.values()), 1e-9)
        cheaper_us = decode_us * max(0.0, 1 - after / before)
        return Shrunk(side, statistics.mean(map(len, copies)), 1e6 / max(total_us - cheaper_us, 1.0))

    def step(self, encoders: ModelConfig, device: torch.device, seconds: float) -> StepFound:
        """The model on cached batches, at the probes' batch and, on a GPU, at twice that."""
        loader = self._loader(self.settings.decoder)
        cached = [loader.batch(step).to(device) for step in range(2)]
        precision: Literal["fp32", "bf16"] = "bf16" if self.config.precision == "bf16" else "fp32"
        stepper = Stepper(
            encoders, cached, device=device, precision=precision, attention=self.config.attention,
            compiled=self.config.compile,
        )  # fmt: skip
        size = len(cached[0].valid)
        try:
            stepper.run(2)
        except torch.OutOfMemoryError:
            raise ValueError(
                f"a step of {size:,} pairs does not fit into the GPU's memory; use --accumulate "
                f"{2 * max(1, self.config.batch_size // size)} or --grad-checkpointing"
            ) from None
        rate, per_cpu_s = _rates(stepper, seconds)
        memory = _memory_gib(stepper)
        doubled_rate = doubled_memory = None
        if device.type == "cuda":
            single = stepper.batches
            try:
                stepper.batches, stepper.batch_size = [_twice(cached[0], cached[1])], 2 * size
                stepper.run(2)
                doubled_rate = _rates(stepper, seconds / 2)[0]
                doubled_memory = _memory_gib(stepper)
            except torch.OutOfMemoryError:
                self.notes.append(f"not probed: twice the batch of {size:,}, for lack of memory")
            stepper.batches, stepper.batch_size = single, size
            stepper.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return StepFound(stepper, size, rate, per_cpu_s, doubled_rate, memory, doubled_memory)

    def joint(self, stepper: Stepper, seconds: float) -> tuple[float, float]:
        """Loader and model as train.py joins them: images/s, and the share of the time in waiting for data."""
        loader = self._loader(self.settings.decoder)
        with contextlib.closing(self._batches(loader, 1_000)) as batches:
            # What was made ahead while nobody took it is not what a run lives on.
            begin = time.perf_counter()
            for _ in range(self._ahead() + 1):
                stepper.step(next(batches))
                if time.perf_counter() - begin > seconds:
                    break
            stepper.synchronize()
            images, waited, steps, begin = 0, 0.0, 0, time.perf_counter()
            while images == 0 or time.perf_counter() - begin < seconds:
                asked = time.perf_counter()
                batch = next(batches)
                waited += time.perf_counter() - asked
                loss = stepper.step(batch)
                images += self._count(batch)
                steps += 1
                if steps % 20 == 0:
                    loss.item()  # as a log line does
            stepper.synchronize()
            elapsed = time.perf_counter() - begin
        return images / elapsed, waited / elapsed

    def _loader(self, decoder: DecoderName) -> Loader:
        if decoder not in self._loaders:
            self._loaders[decoder] = Loader(self.index, self.order, replace(self.settings, decoder=decoder))
        return self._loaders[decoder]

    def _batches(self, loader: Loader, first: int) -> Any:
        config = self.config
        return loader.batches(
            first, first + 10**9, threads=config.threads, prefetch=config.prefetch, workers=config.workers
        )

    def _ahead(self) -> int:
        return min(16, (self.config.workers or self.config.threads) + self.config.prefetch)

    def _count(self, batch: Batch) -> int:
        self.seen += len(batch.valid)
        self.bad += len(batch.rejected)
        for each in batch.rejected:
            self.rejected.append(f"{each.key} in {each.shard}: {each.reason}")
        return len(batch.valid)

    def _decode_seconds(self, jpegs: list[bytes], ids: Any, widths: Any, heights: Any) -> float:
        """CPU time of decoding these images, the least of three."""
        geometry, decoder = self.settings.geometry, self.settings.new_decoder(len(jpegs))
        epoch = np.zeros_like(ids)
        positions = kept_positions(0, epoch, ids, geometry)
        windows = crop_windows(0, epoch, ids, widths, heights, self.settings.crop)
        windows = decoded_windows(windows, positions, geometry)
        found: list[float] = []
        for _ in range(3):
            begin = time.process_time()
            decoder.decode(jpegs, windows, positions, widths, heights)
            found.append(time.process_time() - begin)
        return max(min(found), 1e-9)


def _rates(stepper: Stepper, seconds: float) -> tuple[float, float]:
    """images/s by the clock, the median of its turns, and per second of CPU time."""
    turns = [stepper.run(1)]
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        turns.append(stepper.run(2))
    cpu_s = sum(turn.cpu_s for turn in turns)
    return statistics.median(turn.images_per_s for turn in turns), sum(turn.images for turn in turns) / cpu_s


def _twice(one: Batch, other: Batch) -> Batch:
    names = ("patches", "positions", "caption_ids", "valid", "sample_ids")
    return replace(one, **{name: torch.cat([getattr(one, name), getattr(other, name)]) for name in names})


def _memory_gib(stepper: Stepper) -> float:
    if stepper.device.type == "cuda":
        return torch.cuda.max_memory_allocated(stepper.device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
