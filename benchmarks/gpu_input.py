"""The parts of gpu_check that read JPEGs: decoding on the GPU, damaged files, loader and model together, the starter.

Every part imports what it needs when it runs; gpu_check says which that is.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.tokens import Geometry, token_geometry

from .gpu_part import Context, Skipped

if TYPE_CHECKING:
    from pipeline.index import Index
    from pipeline.loader import DecoderName

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "data" / "emoji"
LEAST_PSNR = 36.0
"""dB between a GPU's patches and the CPU graph's: decoder and resampler round otherwise, by a few levels."""
STARTER_SAMPLES = 50_000
TOP5_MARGIN = 0.02
LOSS_MARGIN = 0.05
_GEOMETRIES = (
    token_geometry(16),
    token_geometry(49, image_reduction="random", image_size=224),
    token_geometry(49, image_reduction="grid", image_size=224),
    token_geometry(49, image_reduction="block", image_size=224),
)
_SIZES = ((128, 160), (256, 341), (400, 300), (600, 800))


@dataclass(frozen=True)
class _Pictures:
    """JPEGs, and what a decoder is told of them."""

    jpegs: list[bytes]
    widths: Any
    heights: Any

    def plan(self, geometry: Geometry) -> tuple[Any, Any]:
        """Windows and positions."""
        from pipeline.plan import DEFAULT_CROP, crop_windows, decoded_windows, kept_positions

        ids = np.arange(len(self.jpegs), dtype=np.int64)
        epoch = np.zeros_like(ids)
        windows = crop_windows(0, epoch, ids, self.widths, self.heights, DEFAULT_CROP)
        positions = kept_positions(0, epoch, ids, geometry)
        return decoded_windows(windows, positions, geometry), positions


def _pictures(count: int, sizes: Sequence[tuple[int, int]] = _SIZES) -> _Pictures:
    """Smooth random pictures with some texture: (height, width) of `sizes` in turn."""
    import simplejpeg

    generator = torch.Generator().manual_seed(0)
    found: list[bytes] = []
    for number in range(count):
        height, width = sizes[number % len(sizes)]
        coarse = torch.rand((1, 3, 6, 8), generator=generator) * 255
        smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
        texture = torch.randn((height // 4 + 1, width // 4 + 1), generator=generator) * 12
        texture = texture.repeat_interleave(4, 0).repeat_interleave(4, 1)[:height, :width, None]
        pixels = (smooth + texture).clamp(0, 255).to(torch.uint8).contiguous().numpy()
        found.append(simplejpeg.encode_jpeg(pixels, 90, colorsubsampling="420"))
    chosen = np.array([sizes[number % len(sizes)] for number in range(count)], np.int32)
    return _Pictures(found, chosen[:, 1].copy(), chosen[:, 0].copy())


def decodes_as_the_cpu(context: Context) -> None:
    """DALI's graph on the device against the same graph on the CPU, for all four reductions, with the decode of a
    window only (where the device's decoder can; asked in a process of its own) and of whole images."""
    from pipeline.decode import psnr
    from pipeline.decode_dali import DaliDecoder, window_decode_works

    device_id = context.device.index or 0 if context.on_gpu else None
    works = window_decode_works(device_id)
    context.row(reduction="(any)", window_decode="works" if works else "does not work here: whole images are decoded")
    pictures = _pictures(12 if context.quick else 96)
    for geometry in _GEOMETRIES:
        windows, positions = pictures.plan(geometry)
        about = (windows, positions, pictures.widths, pictures.heights)
        expected = DaliDecoder(geometry, 128, None, decode_window=True).decode(pictures.jpegs, *about)
        for decode_window in (True, False) if works else (False,):
            begin = time.perf_counter()
            decoder = DaliDecoder(geometry, 128, device_id, decode_window=decode_window)
            built_s = time.perf_counter() - begin
            own = decoder.decode(pictures.jpegs, *about)
            quality = psnr(own.patches.cpu().numpy(), expected.patches.numpy())
            passed = not own.faults and quality >= LEAST_PSNR
            window = "window" if decode_window else "whole image"
            what = f"{geometry.image_reduction}, {window}: {quality:.1f} dB to the CPU, {len(own.faults)} not decoded"
            context.row(
                reduction=geometry.image_reduction, tokens=geometry.tokens, window_decode=window, psnr_db=quality,
                least_db=LEAST_PSNR, build_s=built_s, images_per_s=_decode_rate(context, decoder, geometry),
                result=context.judge(passed, what),
            )  # fmt: skip


def _decode_rate(context: Context, decoder: Any, geometry: Geometry) -> float:
    """images/s of 128 pixels, one decoder alone."""
    pictures = _pictures(32 if context.quick else 512, ((128, 160),))
    about = (*pictures.plan(geometry), pictures.widths, pictures.heights)
    decoder.decode(pictures.jpegs, *about)
    begin, images = time.perf_counter(), 0
    while images == 0 or time.perf_counter() - begin < (0 if context.quick else 1):
        decoder.decode(pictures.jpegs, *about)
        if context.on_gpu:
            torch.cuda.synchronize()
        images += len(pictures.jpegs)
    return images / (time.perf_counter() - begin)


def survives_damage(context: Context) -> None:
    """Batches with damaged JPEGs on the device: the others' patches are what they were, and the next batch is whole.

    A decoder that dies takes the process with it; the kinds of damage before that one are in the table then.
    """
    from pipeline.decode import psnr
    from pipeline.decode_dali import DaliDecoder
    from pipeline.jpeg import fatal_error

    from .damages import DAMAGES

    geometry = token_geometry(16)
    pictures = _pictures(16)
    about = (*pictures.plan(geometry), pictures.widths, pictures.heights)
    decoder = DaliDecoder(geometry, 16, context.device.index or 0 if context.on_gpu else None)
    clean = decoder.decode(pictures.jpegs, *about).patches.cpu().numpy()
    rng = np.random.default_rng(0)
    for damage in DAMAGES:
        hurt = range(1, 16, 5)
        jpegs = [damage(jpeg, rng) if slot in hurt else jpeg for slot, jpeg in enumerate(pictures.jpegs)]
        begin = time.perf_counter()
        found = decoder.decode(jpegs, *about)
        seconds = time.perf_counter() - begin
        well = [slot for slot in range(16) if slot not in hurt]
        quality = psnr(found.patches.cpu().numpy()[well], clean[well])
        after = decoder.decode(pictures.jpegs, *about)
        passed = quality >= 50 and not set(found.faults) & set(well) and not after.faults
        name = damage.__name__.replace("_", " ")
        what = f"{name}: others at {quality:.1f} dB, {len(after.faults)} of the next batch not decoded"
        context.row(
            damage=name, damaged=len(hurt), left_out=len(found.faults),
            refused_by_libjpeg=sum(fatal_error(jpegs[slot]) is not None for slot in hurt),
            others_psnr_db=quality, next_batch_faults=len(after.faults), seconds=seconds,
            result=context.judge(passed, what),
        )  # fmt: skip


@contextmanager
def shard_set(context: Context) -> Generator[Path]:
    """--data, or the starter's training shards, or a made set in a temporary folder."""
    if context.data is not None:
        yield context.data
    elif (STARTER / "train").is_dir() and not context.quick:
        yield STARTER / "train"
    else:
        with tempfile.TemporaryDirectory() as folder:
            write_shards(Path(folder), 64 if context.quick else 8192)
            yield Path(folder)


def write_shards(folder: Path, count: int) -> None:
    """Writes pairs of 128-pixel pictures and captions, 1,024 a shard."""
    pictures = _pictures(min(count, 256), ((128, 160), (160, 128)))
    for first in range(0, count, 1024):
        with tarfile.open(folder / f"{first // 1024:05d}.tar", "w") as tar:
            for number in range(first, min(count, first + 1024)):
                jpeg = pictures.jpegs[number % len(pictures.jpegs)]
                for ending, content in (("jpg", jpeg), ("txt", f"a made picture, number {number}".encode())):
                    member = tarfile.TarInfo(f"{number:09d}.{ending}")
                    member.size = len(content)
                    tar.addfile(member, BytesIO(content))


def end_to_end(context: Context) -> None:
    """What the model needs, what each decoder gives, and what both together reach; where the loader is the slower."""
    from model.presets import model_config
    from pipeline.index import open_index

    from .gpu_step import MODELS, TINY, TOKENS

    cores = len(os.sched_getaffinity(0))
    decoders: list[tuple[DecoderName, int]] = [("turbo", max(1, min(16, cores - 2)))]
    if _importable("nvidia.dali"):
        decoders.append(("dali", 2 if context.on_gpu else 1))
    sys.setswitchinterval(0.0005)  # as train.py
    with shard_set(context) as folder:
        index = open_index([folder], progress=False)
        for tokens in (16,) if context.quick else TOKENS:
            for config in (TINY,) if context.quick else map(model_config, MODELS):
                for decoder, threads in decoders:
                    what = f"{config.name}, {tokens} tokens, {decoder}"
                    if not context.enough_time(0 if context.quick else 15, f"{what}, and what comes after"):
                        return
                    _join(context, index, folder, config, tokens, decoder, threads)


def _join(
    context: Context, index: "Index", folder: Path, config: Any, tokens: int, decoder: "DecoderName", threads: int
) -> None:
    from pipeline.loader import Loader, Settings
    from pipeline.order import Order, default_lanes

    from .step_model import Stepper

    geometry = token_geometry(tokens, patch=config.image.patch)
    batch_size = min(8 if context.quick else 1024, 2 ** int(math.log2(index.num_usable)))
    seconds = 0.3 if context.quick else 3.0
    order = Order(index.shard_sizes, batch_size=batch_size, seed=0, lanes=default_lanes(batch_size))
    on_gpu = context.on_gpu and decoder == "dali"
    settings = Settings(geometry, 16, decoder, device_id=context.device.index or 0 if on_gpu else None)
    loader = Loader(index, order, settings)
    cached = [loader.batch(step).to(context.device) for step in range(2)]
    with context.device:
        stepper = Stepper(config, cached, device=context.device, precision="bf16" if context.on_gpu else "fp32")
    stepper.run(3)
    begin = time.perf_counter()
    turns = [stepper.run(2)]
    while time.perf_counter() - begin < seconds:
        turns.append(stepper.run(2))
    model_rate = statistics.median(turn.images_per_s for turn in turns)
    with closing(loader.batches(2, sys.maxsize, threads=threads, prefetch=3)) as batches:
        for _ in range(threads + 4):  # what was made ahead while nobody took anything
            next(batches)
        begin, images = time.perf_counter(), 0
        while images == 0 or time.perf_counter() - begin < seconds:
            images += len(next(batches).valid)
        loader_rate = images / (time.perf_counter() - begin)
        begin, images = time.perf_counter(), 0
        losses: list[torch.Tensor] = []
        while images == 0 or time.perf_counter() - begin < seconds:
            losses.append(stepper.step(next(batches)))
            images += batch_size
            if len(losses) % 20 == 0:
                losses[-1].item()  # as a log line does
        finite = all(map(math.isfinite, torch.stack(losses).tolist()))
        joint_rate = images / (time.perf_counter() - begin)
    context.row(
        model=config.name,
        tokens=tokens,
        data=folder.name if context.data or folder.name == "train" else "made, 128 px",
        decoder=f"{decoder} on the {'GPU' if on_gpu else 'CPU'}, {threads} threads",
        batch=batch_size,
        required_images_per_s=model_rate,
        loader_images_per_s=loader_rate,
        loader_over_required=loader_rate / model_rate,
        end_to_end_images_per_s=joint_rate,
        of_the_lesser=joint_rate / min(model_rate, loader_rate),
        result=context.judge(finite, f"{config.name}, {tokens} tokens, {decoder}: a loss is not finite"),
    )


def starter_as_the_cpu(context: Context) -> None:
    """The demo's run, shortened, by train.py itself on the CPU and on the device in bf16: accuracy and loss."""
    if not (STARTER / "zero_shot").is_dir() or not (STARTER / "train").is_dir():
        raise Skipped("data/emoji is not here (make demo); the part `learning` did the like on made data")
    decoder = "dali" if _importable("nvidia.dali") else "turbo"
    cores = len(os.sched_getaffinity(0))
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for device, flags in (
            ("cpu", ["--decoder", "turbo"]),
            ("cuda", ["--decoder", decoder, "--threads", str(max(1, min(4, cores - 2)))]),
        ):
            begin = time.perf_counter()
            metrics = _train_starter(context, Path(folder) / device, device, flags)
            found[device] = metrics
            context.row(
                device=device, pairs=STARTER_SAMPLES, loss=metrics["loss"], top1=metrics["zero_shot_top1"],
                top5=metrics["zero_shot_top5"], images_per_s=metrics["images_per_s"],
                data_wait=metrics["data_wait_fraction"], seconds=time.perf_counter() - begin, result="measured",
            )  # fmt: skip
    cpu, own = found["cpu"], found["cuda"]
    passed = own["zero_shot_top5"] >= cpu["zero_shot_top5"] - TOP5_MARGIN
    passed &= own["loss"] <= cpu["loss"] * (1 + LOSS_MARGIN)
    what = (
        f"top-5 {own['zero_shot_top5']:.2%} against {cpu['zero_shot_top5']:.2%} (at most {TOP5_MARGIN:.0%} less), "
        f"loss {own['loss']:.3f} against {cpu['loss']:.3f} (at most {LOSS_MARGIN:.0%} more)"
    )
    context.row(device=what, result=context.judge(passed, what))


def _train_starter(context: Context, out: Path, device: str, flags: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "train.py", "--preset", "training/presets/demo.toml", "--out", str(out)]
    command += ["--samples", str(STARTER_SAMPLES), "--device", device, "--eval-every", "1000000", *flags]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, context.seconds_left), check=False
    )
    if done.returncode:
        raise RuntimeError(f"train.py --device {device} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])


def gpu_tests(context: Context) -> None:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=max(1, context.seconds_left), check=False
    )
    lines = done.stdout.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR", "SKIPPED")):
            context.row(test=line[:300], result="")
    what = lines[-1] if lines else done.stderr.strip()[-300:]
    context.row(test=what, result=context.judge(done.returncode == 0, f"pytest -m gpu: {what}"))


def _importable(module: str) -> bool:
    from .gpu_check import missing

    return not missing((module,))
