"""Everything the loader benchmark lets take turns: our loader, open_clip's, DALI's stock reader, and bare decoding.

Each runs a number of batches and says how many images that were and what they cost; nothing else of them is compared.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import simplejpeg

from pipeline.batch import Batch
from pipeline.decode_turbo import scale_eighths
from pipeline.index import Index
from pipeline.loader import STAGES, DecoderName, Loader, Settings
from pipeline.order import Order, default_lanes
from pipeline.plan import DEFAULT_CROP, crop_windows, decoded_windows, kept_positions
from pipeline.read import Reader
from pipeline.scaled import scaled_side
from pipeline.tokens import Geometry

from .peer_process import PEERS_PYTHON, PeerProcess, Skipped

STOCK_SIZE = 224
"""Pixels a side that DALI's stock pipeline resizes to."""
_BARE_IMAGES = 1024


@dataclass(frozen=True)
class Round:
    """What some batches cost."""

    images: int
    cpu_s: float
    """CPU time of all threads, and of child processes that make batches."""
    wall_s: float
    stage_us: dict[str, float]
    """CPU time an image spends in each stage; our loader alone knows."""

    @property
    def per_cpu_s(self) -> float:
        return self.images / self.cpu_s


class Contender(Protocol):
    """Runs batches when it is its turn and is idle between. Raises Skipped where it cannot go on."""

    def run(self, batches: int) -> Round: ...

    def close(self) -> None: ...


class OurLoader:
    """The loader of this project: order, plan, read, decode, captions."""

    def __init__(
        self,
        index: Index,
        geometry: Geometry,
        decoder: DecoderName,
        *,
        batch_size: int,
        text_tokens: int,
        threads: int,
        workers: int = 0,
    ) -> None:
        order = Order(index.shard_sizes, batch_size=batch_size, seed=0, lanes=default_lanes(batch_size))
        self._loader = Loader(index, order, Settings(geometry, text_tokens, decoder))
        self._decoder, self._threads, self._step = decoder, threads, 0
        # Worker processes live as long as this: they take seconds to start, and make a few batches ahead of a round.
        self._made_by_workers = self._loader.batches(0, sys.maxsize, workers=workers) if workers else None

    def run(self, batches: int) -> Round:
        seconds = self._loader.stage_seconds
        for stage in seconds:
            seconds[stage] = 0.0
        images = 0
        cpu, wall = self._cpu_s(), time.perf_counter()
        for batch in self._batches(batches):
            images += len(batch.valid)
        cpu_s, wall_s = self._cpu_s() - cpu, time.perf_counter() - wall
        self._step += batches
        rest = cpu_s - sum(seconds.values())
        stages = {stage: seconds[stage] / images * 1e6 for stage in STAGES}
        if self._decoder == "dali":
            # DALI decodes on threads of its own, which a stage's clock does not see.
            stages["decode"] += rest / images * 1e6
        else:
            stages["hand-over"] = rest / images * 1e6
        return Round(images, cpu_s, wall_s, stages)

    def _batches(self, batches: int) -> Iterator[Batch]:
        if self._made_by_workers is not None:
            return islice(self._made_by_workers, batches)
        return self._loader.batches(self._step, self._step + batches, threads=self._threads)

    def _cpu_s(self) -> float:
        return time.process_time() + self._loader.worker_seconds

    def close(self) -> None:
        """Ends the worker processes; without, nothing outlives a round."""
        if self._made_by_workers is not None:
            self._made_by_workers.close()


class OpenClip:
    """open_clip's training loader, in a process of its own environment; see peers.py."""

    def __init__(
        self, shards: Sequence[Path], image_size: int, batch_size: int, workers: int, python: Path = PEERS_PYTHON
    ) -> None:
        if not python.exists():
            raise Skipped(f"{python.parents[1]} is missing; `make peers` makes it")
        # -P: the folder of the script holds modules of ours, which it must not see.
        command = [python, "-P", Path(__file__).with_name("peers.py"), *shards, "--image-size", image_size]
        command += ["--batch-size", batch_size, "--workers", workers]
        self._peer = PeerProcess(list(map(str, command)))
        self.about = self._peer.answer()

    def run(self, batches: int) -> Round:
        answer = self._peer.ask(batches)
        return Round(answer["images"], answer["cpu_s"], answer["wall_s"], {})

    def close(self) -> None:
        self._peer.close()


class StockDali:
    """DALI's own webdataset reader as its examples have it: random crop decoded at full size, resize, normalise.

    Float pictures of 224 px come out, and captions as raw bytes: no tokens are dropped and no text is cut.
    """

    def __init__(self, shards: Sequence[Path], batch_size: int, threads: int) -> None:
        try:
            from nvidia import dali
        except ImportError:
            raise Skipped("nvidia-dali-cuda120 is not installed; it exists for Linux on x86-64") from None
        fn: Any = dali.fn
        types: Any = dali.types
        pipeline_def: Any = dali.pipeline_def

        @pipeline_def
        def graph() -> Any:
            jpeg, text = fn.readers.webdataset(
                paths=list(map(str, shards)), ext=["jpg", "txt"], random_shuffle=True, initial_fill=1024, name="reader"
            )
            pixels = fn.decoders.image_random_crop(
                jpeg, output_type=types.RGB, random_area=list(DEFAULT_CROP.area), random_aspect_ratio=[3 / 4, 4 / 3]
            )
            pixels = fn.resize(pixels, size=[STOCK_SIZE, STOCK_SIZE])
            mean, std = ([255 * value for value in values] for values in (_MEAN, _STD))
            return fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std), text

        # Nothing is made ahead, or it would be paid for in another's turn.
        self._pipeline = graph(
            batch_size=batch_size,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
            seed=0,
        )
        self._pipeline.build()

    def run(self, batches: int) -> Round:
        images = 0
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(batches):
            pixels, _text = self._pipeline.run()
            images += len(pixels)
        return Round(images, time.process_time() - cpu, time.perf_counter() - wall, {})

    def close(self) -> None:
        del self._pipeline


_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class BareDecode:
    """libjpeg-turbo on JPEGs in memory and nothing else: the limit, of full size or of the scale turbo would choose."""

    def __init__(self, index: Index, geometry: Geometry | None, batch_size: int) -> None:
        """geometry: decode each at the scale that it asks for; None: at full size."""
        order = Order(index.shard_sizes, batch_size=batch_size, seed=0, lanes=default_lanes(batch_size))
        reader = Reader(index)
        self._batches: list[list[tuple[bytes, int, int]]] = []
        for step in range(max(1, _BARE_IMAGES // batch_size)):
            slots = order.slots(step, 0, 1)
            rows = reader.locate(slots)
            heights, widths = np.zeros_like(rows.height), np.zeros_like(rows.width)
            if geometry is not None:
                windows = crop_windows(0, slots.epoch, rows.sample_ids, rows.width, rows.height, DEFAULT_CROP)
                positions = kept_positions(0, slots.epoch, rows.sample_ids, geometry)
                eighths = scale_eighths(decoded_windows(windows, positions, geometry), geometry.decoded_size)
                heights, widths = (
                    np.where(eighths < 8, scaled_side(side, eighths), 0) for side in (rows.height, rows.width)
                )
            self._batches.append(
                [
                    (jpeg, height, width)
                    for jpeg, height, width in zip(reader.images(rows), heights.tolist(), widths.tolist(), strict=True)
                    if not isinstance(jpeg, str)
                ]
            )
        self._turn = 0

    def run(self, batches: int) -> Round:
        images = 0
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(batches):
            batch = self._batches[self._turn % len(self._batches)]
            self._turn += 1
            for jpeg, height, width in batch:
                # The flags of pipeline/decode_turbo.py: fast DCT, fast upsampling, not strict.
                simplejpeg.decode_jpeg(jpeg, "RGB", True, True, height, width, 1, None, False)
            images += len(batch)
        return Round(images, time.process_time() - cpu, time.perf_counter() - wall, {})

    def close(self) -> None:
        self._batches.clear()


def gil_us(contender: Contender, batches: int) -> float | None:
    """Returns the wall time an image holds this process's GIL, in microseconds; None without gilknocker.

    To be called between rounds: the meter, a thread that asks for the GIL a thousand times a second, takes a core.
    The least of three: whoever else uses the machine only adds to it.
    """
    try:
        from gilknocker import KnockKnock  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs
    except ImportError:
        return None
    found: list[float] = []
    for _ in range(3):
        knocker: Any = KnockKnock(
            polling_interval_micros=1000, sampling_interval_micros=1000, sleeping_interval_micros=0
        )
        knocker.start()
        done = contender.run(batches)
        knocker.stop()
        found.append(knocker.contention_metric * done.wall_s / done.images * 1e6)
    return min(found)
