"""Everything joined: steps in, ready batches out, in order, made ahead of time by threads behind a bounded queue.

A batch is a pure function of its step, so threads, prefetch depth and decoder change nothing, and the whole state is
the step plus the samples found bad on the way (kept only so that a bad image is not decoded again).
"""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from .batch import Batch, Rejection
from .captions import WordPieceTruncate
from .decode import Decoder
from .decode_dali import DaliDecoder
from .decode_turbo import TurboDecoder
from .index import Index, IntArray
from .order import Order
from .read import Reader, Rows
from .tokens import DEFAULT_CROP, CropRange, Geometry, Windows, caption_choice, crop_windows, whole_windows

DecoderName = Literal["dali", "turbo"]

EVALUATION_BATCH_SIZE = 256
STAGES: tuple[str, ...] = ("order", "plan", "read", "decode", "captions")


@dataclass(frozen=True)
class Settings:
    """What of a batch is the same at every step."""

    geometry: Geometry
    text_tokens: int
    decoder: DecoderName
    crop: CropRange = DEFAULT_CROP
    captions: Literal["any", "first"] = "any"
    """Where a sample has several: one drawn each epoch, or always the first."""
    seed: int = 0
    device_id: int | None = None
    """The GPU on which DALI decodes; None for the CPU."""

    def new_decoder(self, batch_size: int) -> Decoder:
        """Returns a decoder for one thread. Raises ValueError where the library for it is missing."""
        if self.decoder == "dali":
            return DaliDecoder(self.geometry, batch_size, self.device_id)
        return TurboDecoder(self.geometry)


class Loader:
    """Batches of a run. `batch(step)` makes one; `batches` makes them ahead, on threads."""

    def __init__(
        self, index: Index, order: Order | None, settings: Settings, *, rank: int = 0, world_size: int = 1
    ) -> None:
        """order: of training batches; None where samples are only evaluated, one after the other.

        Raises ValueError where ranks cannot share the lanes, or a decoder or vocabulary is missing.
        """
        self.index, self.order, self.settings = index, order, settings
        self.rank, self.world_size = rank, world_size
        self.local_batch_size = order.batch_size // world_size if order else EVALUATION_BATCH_SIZE
        self.reader = Reader(index)
        self.tokenizer = WordPieceTruncate(settings.text_tokens)
        self.known_bad: dict[int, str] = {}
        """Sample id -> reason, of the images that no decoder could read."""
        self.stage_seconds = dict.fromkeys(STAGES, 0.0)
        """CPU time of the worker threads by stage, summed over batches."""
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
        seed = self.settings.seed
        windows = crop_windows(seed, slots.epoch, rows.sample_ids, rows.width, rows.height, self.settings.crop)
        allowed = rows.num_captions if self.settings.captions == "any" else np.ones_like(rows.num_captions)
        choice = caption_choice(seed, slots.epoch, rows.sample_ids, allowed)
        clock.lap("plan")
        return self._assemble(rows, windows, choice, clock)

    def batches(self, first_step: int, end_step: int, *, threads: int = 1, prefetch: int = 2) -> Generator[Batch]:
        """Yields the batches of steps [first_step, end_step) in order, at most threads + prefetch made ahead."""
        with ThreadPoolExecutor(threads, thread_name_prefix="loader") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for step in range(first_step, end_step):
                    ahead.append(pool.submit(self.batch, step))
                    if len(ahead) > threads + prefetch:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def evaluation_batches(self, sample_ids: IntArray) -> Iterator[Batch]:
        """Yields the given samples in order: whole images squeezed to the square, first captions."""
        step = self.local_batch_size
        for start in range(0, len(sample_ids), step):
            rows = self.reader.locate_ids(sample_ids[start : start + step])
            windows = whole_windows(rows.width, rows.height)
            yield self._assemble(rows, windows, np.zeros(len(windows), np.int64), _StageClock(self.stage_seconds))

    def _assemble(self, rows: Rows, windows: Windows, choice: IntArray, clock: "_StageClock") -> Batch:
        ids = rows.sample_ids.tolist()
        images, captions = self.reader.images(rows), self.reader.captions(rows, choice)
        faults = {slot: fault for slot, sample in enumerate(ids) if (fault := self.known_bad.get(sample))}
        faults |= {
            slot: item for items in (images, captions) for slot, item in enumerate(items) if isinstance(item, str)
        }
        jpegs = [None if slot in faults or isinstance(image, str) else image for slot, image in enumerate(images)]
        clock.lap("read")
        decoded = self._decoder().decode(jpegs, windows, rows.width, rows.height)
        for slot, fault in decoded.faults.items():
            self.known_bad[ids[slot]] = faults[slot] = fault
        clock.lap("decode")
        caption_ids = self.tokenizer.encode([b"" if isinstance(text, str) else text for text in captions])
        clock.lap("captions")
        geometry = self.settings.geometry
        valid = np.ones(len(ids), np.bool_)
        valid[list(faults)] = False
        positions = np.broadcast_to(np.arange(geometry.tokens, dtype=np.int16), (len(ids), geometry.tokens)).copy()
        return Batch(
            patches=decoded.patches,
            positions=torch.from_numpy(positions),
            grid=geometry.grid,
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


class _StageClock:
    """Adds a thread's CPU time to a stage. Threads may lose an addition to each other: a report, not a count."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds, self._last = seconds, time.thread_time()

    def lap(self, stage: str) -> None:
        now = time.thread_time()
        self._seconds[stage] += now - self._last
        self._last = now
