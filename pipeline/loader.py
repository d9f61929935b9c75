"""Everything joined: steps in, ready batches out, in order, made ahead of time by threads or by worker processes.

A batch is a pure function of its step, so threads, workers, prefetch depth and decoder change nothing, and the whole
state is the step plus the samples found bad on the way (kept only so that a bad image is not decoded again).
"""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from .batch import Batch, Rejection
from .captions import Draws, TextReduction, TokenizerName, caption_encoder
from .colour import NO_JITTER, ColourJitter, ColourMaps, apply_maps, colour_maps
from .decode import Decoder
from .decode_dali import DaliDecoder
from .decode_turbo import TurboDecoder
from .index import Index, IntArray
from .order import BatchOrder
from .plan import (
    DEFAULT_CROP,
    CropRange,
    Windows,
    caption_choice,
    crop_windows,
    decoded_windows,
    kept_positions,
    whole_windows,
)
from .processes import process_batches
from .read import Reader, Rows
from .tokens import Geometry, Positions

DecoderName = Literal["dali", "turbo"]

EVALUATION_BATCH_SIZE = 256
_FETCH_AHEAD_STEPS = 32
"""How many steps before it is read a remote shard is asked for."""
STAGES: tuple[str, ...] = ("order", "plan", "read", "decode", "colour", "captions")


@dataclass(frozen=True)
class Settings:
    """What of a batch is the same at every step."""

    geometry: Geometry
    text_tokens: int
    decoder: DecoderName
    crop: CropRange = DEFAULT_CROP
    colour: ColourJitter = NO_JITTER
    captions: Literal["any", "first"] = "any"
    """Where a sample has several: one drawn each epoch, or always the first."""
    text_reduction: TextReduction = "truncate"
    tokenizer: TokenizerName = "wordpiece"
    vocabulary: Path | None = None
    """The tokenizer's vocabulary file; None for the installed one."""
    seed: int = 0
    device_id: int | None = None
    """The GPU on which DALI decodes; None for the CPU."""

    def new_decoder(self, batch_size: int) -> Decoder:
        """Returns a decoder for one thread. Raises ValueError where the library for it is missing."""
        if self.decoder == "dali":
            return DaliDecoder(self.geometry, batch_size, self.device_id)
        return TurboDecoder(self.geometry)


class Loader:
    """Batches of a run. `batch(step)` makes one; `batches` makes them ahead, on threads or in worker processes."""

    def __init__(
        self, index: Index, order: BatchOrder | None, settings: Settings, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """order: of training batches; None where samples are only evaluated, one after the other.

        Raises ValueError where ranks cannot share the lanes, or a decoder or vocabulary is missing.
        """
        self.index, self.order = index, order
        if order is None:  # evaluation sees whole images, and draws nothing
            settings = replace(settings, geometry=settings.geometry.unmasked(), text_reduction="truncate")
        self.settings = settings
        self.rank, self.world_size = rank, world_size
        self.local_batch_size = order.batch_size // world_size if order else EVALUATION_BATCH_SIZE
        self.reader = Reader(index)
        self.encoder = caption_encoder(
            settings.tokenizer, settings.text_tokens, settings.text_reduction, settings.vocabulary
        )
        self.known_bad: dict[int, str] = {}
        """Sample id -> reason, of the images that no decoder could read."""
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        """CPU time of the threads or processes that make batches, by stage, summed over batches."""
        self.worker_seconds = 0.0
        """CPU time of the worker processes, all their threads, summed over batches."""
        self._local = threading.local()
        if order:
            order.slots(0, rank, world_size)
        # A missing library is found now, not in the first batch on some thread.
        self._decoder()

    def batch(self, step: int) -> Batch:
        """Returns this rank's slots of global batch `step` (0-based). Raises ReadFailed when the disk refuses."""
        assert self.order is not None, "a loader without an order has no training batches"
        clock = _StageClock(self.stage_seconds)
        slots = self.order.slots(step, self.rank, self.world_size)
        rows = self.reader.locate(slots)
        clock.lap("order")
        plan = self._plan(rows, slots.epoch)
        clock.lap("plan")
        return self._assemble(rows, plan, clock)

    def batches(
        self, first_step: int, end_step: int, *, threads: int = 1, prefetch: int = 2, workers: int = 0
    ) -> Generator[Batch]:
        """Yields the batches of steps [first_step, end_step) in order, some made ahead: at most `prefetch`, and one
        for each thread or worker.

        workers: processes that make batches instead of threads of this one, which leaves its GIL alone. Their memory
        is the tensors' own: keeping batches is safe, but from the third on they are copies.
        Raises ValueError where there can be no workers.
        """
        if not workers:
            return self._thread_batches(range(first_step, end_step), threads, prefetch)
        check_workers(self.settings, workers)
        return process_batches(self, range(first_step, end_step), workers, prefetch)

    def _thread_batches(self, steps: range, threads: int, prefetch: int) -> Generator[Batch]:
        with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for step in steps:
                    self.fetch_ahead(step, steps.stop)
                    ahead.append(pool.submit(self.batch, step))
                    if len(ahead) > threads + prefetch:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def fetch_ahead(self, step: int, end_step: int) -> None:
        """Starts to fetch remote shards that a later step before `end_step` reads; to be called at each step."""
        if self.index.remote and self.order is not None and (later := step + _FETCH_AHEAD_STEPS) < end_step:
            self.reader.prefetch(np.unique(self.order.slots(later, self.rank, self.world_size).shard))

    def evaluation_batches(self, sample_ids: IntArray) -> Iterator[Batch]:
        """Yields the given samples in order: whole images squeezed to the square, first captions."""
        step = self.local_batch_size
        for start in range(0, len(sample_ids), step):
            rows = self.reader.locate_ids(sample_ids[start : start + step])
            first = np.zeros_like(rows.sample_ids)
            positions = kept_positions(0, first, rows.sample_ids, self.settings.geometry)
            plan = _Plan(whole_windows(rows.width, rows.height), positions, first, None, None)
            yield self._assemble(rows, plan, _StageClock(self.stage_seconds))

    def _plan(self, rows: Rows, epoch: IntArray) -> "_Plan":
        settings, ids = self.settings, rows.sample_ids
        windows = crop_windows(settings.seed, epoch, ids, rows.width, rows.height, settings.crop)
        positions = kept_positions(settings.seed, epoch, ids, settings.geometry)
        return _Plan(
            decoded_windows(windows, positions, settings.geometry),
            positions,
            self.caption_choice(rows, epoch),
            self.encoder.draws(settings.seed, epoch, ids),
            None if settings.colour.changes_nothing else colour_maps(settings.seed, epoch, ids, settings.colour),
        )

    def caption_choice(self, rows: Rows, epoch: IntArray) -> IntArray:
        """Returns which of its captions each sample shows in its epoch, int64 [batch]."""
        if self.settings.captions == "first":
            return np.zeros_like(rows.num_captions)
        return caption_choice(self.settings.seed, epoch, rows.sample_ids, rows.num_captions)

    def _assemble(self, rows: Rows, plan: "_Plan", clock: "_StageClock") -> Batch:
        ids = rows.sample_ids.tolist()
        images, captions = self.reader.images(rows), self.reader.captions(rows, plan.caption)
        faults = {slot: fault for slot, sample in enumerate(ids) if (fault := self.known_bad.get(sample))}
        faults |= {
            slot: item for items in (images, captions) for slot, item in enumerate(items) if isinstance(item, str)
        }
        jpegs = [None if slot in faults or isinstance(image, str) else image for slot, image in enumerate(images)]
        clock.lap("read")
        decoded = self._decoder().decode(jpegs, plan.windows, plan.positions, rows.width, rows.height)
        for slot, fault in decoded.faults.items():
            self.known_bad[ids[slot]] = faults[slot] = fault
        clock.lap("decode")
        patches = decoded.patches if plan.colours is None else apply_maps(decoded.patches, plan.colours)
        clock.lap("colour")
        texts = [b"" if isinstance(text, str) else text for text in captions]
        caption_ids = self.encoder.encode(texts, plan.text_draws)
        clock.lap("captions")
        valid = np.ones(len(ids), np.bool_)
        valid[list(faults)] = False
        return Batch(
            patches=patches,
            positions=torch.from_numpy(plan.positions),
            grid=self.settings.geometry.grid,
            caption_ids=torch.from_numpy(caption_ids),
            valid=torch.from_numpy(valid),
            sample_ids=torch.from_numpy(rows.sample_ids),
            rejected=tuple(self._rejection(ids[slot], reason) for slot, reason in sorted(faults.items())),
        )

    def _rejection(self, sample_id: int, reason: str) -> Rejection:
        shard, row = self.index.locate(sample_id)
        return Rejection(sample_id, self.index.shards[shard].path, self.reader.key(shard, row), reason)

    def _decoder(self) -> Decoder:
        if not hasattr(self._local, "decoder"):
            self._local.decoder = self.settings.new_decoder(self.local_batch_size)
        return self._local.decoder


def check_workers(settings: Settings, workers: int) -> None:
    """Raises ValueError where batches of these settings cannot be made by so many worker processes."""
    if workers < 0:
        raise ValueError(f"--workers {workers} is below 0; 0 makes batches on threads of the training process")
    if workers and settings.decoder == "dali" and settings.device_id is not None:
        raise ValueError(
            f"--workers {workers}: --decoder dali decodes on GPU {settings.device_id}, which only the training process "
            "does; use --workers 0, or --decoder turbo"
        )


@dataclass(frozen=True)
class _Plan:
    """What was drawn for a batch, beside its order."""

    windows: Windows
    """What the decoder looks at."""
    positions: Positions
    caption: IntArray
    """[batch]: which of its captions each sample shows."""
    text_draws: Draws | None
    colours: ColourMaps | None


class _StageClock:
    """Adds a thread's CPU time to a stage. Threads may lose an addition to each other: a report, not a count."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.thread_time()

    def lap(self, stage: str) -> None:
        now = time.thread_time()
        self._seconds[stage] += now - self._last
        self._last = now
