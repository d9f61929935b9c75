"""The parts of gpu_check that need no data: the device, learning in bf16, the step's tables, torch.compile.

Torch and NumPy alone are needed here.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from model.clip import gflops_per_pair
from model.presets import ImageConfig, ModelConfig, TextConfig, model_config
from pipeline.batch import Batch
from pipeline.tokens import token_geometry
from training import optim

from .gpu_part import Context
from .step_gemm import GemmMeter, data_sheet_gflop_per_s, gemms
from .step_model import Stepper, made_batches

MODELS = ("ViT-B-16", "ViT-L-16", "ViT-L-14", "ViT-H-14")
TOKENS = (16, 36, 49)
TEXT_TOKENS = 16
FIRST_BATCH = 256
LARGEST_BATCH = 8192
"""Above it training computes the loss in blocks, and this one would need gigabytes for it."""
ACCURACY_MARGIN = 0.03
LOSS_MARGIN, LOSS_FLOOR = 0.10, 0.05
"""The task is learned to a loss near 0, where a share of it means nothing."""

TINY = ModelConfig(
    "tiny",
    ImageConfig(width=64, layers=1, heads=1, mlp_width=128, patch=16, pooling="patch_mean"),
    TextConfig(width=64, layers=1, heads=1, mlp_width=128),
    embed_dim=64,
)
"""Of --quick."""


def describe_device(context: Context) -> None:
    """What the machine is, and its rate of large matrix products beside the data sheet's."""
    if context.on_gpu:
        properties = torch.cuda.get_device_properties(context.device)
        context.row(what="device", value=properties.name)
        context.row(what="memory GiB", value=properties.total_memory / 2**30)
        context.row(what="compute capability", value=f"{properties.major}.{properties.minor}")
        context.row(what="torch's CUDA", value=torch.version.cuda)
        context.row(what="driver", value=_driver())
    for dtype in (torch.bfloat16, torch.float32) if context.on_gpu else (torch.float32,):
        side = 512 if context.quick else 8192
        a = torch.randn(side, side, device=context.device).to(dtype)
        torch.mm(a, a)
        seconds = min(_seconds(context, lambda a=a: torch.mm(a, a)) for _ in range(5))
        rate, sheet = 2 * side**3 / seconds / 1e12, data_sheet_gflop_per_s(context.device, dtype)
        name = str(dtype).removeprefix("torch.")
        context.row(what=f"product of {side} x {side}, {name}: TFLOP/s", value=rate)
        if sheet is not None and dtype == torch.bfloat16:
            context.row(what="its share of the data sheet's", value=rate * 1e3 / sheet)


def _driver() -> str | None:
    try:
        return Path("/proc/driver/nvidia/version").read_text().splitlines()[0].strip()
    except (OSError, IndexError):
        return None


def _seconds(context: Context, call: Callable[[], object]) -> float:
    if context.on_gpu:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    call()
    if context.on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def learns(context: Context) -> None:
    """The same made task, on the CPU in float32 and on the GPU in bf16: no step without a number, and the GPU ends as
    near to the CPU as the margins say. Tried on a CPU, float32 is compared with itself.

    Each class is a picture of random pixels and a caption of random ids; a sample is its class's picture under noise.
    """
    steps = 30 if context.quick else 300
    config, batch_size = (TINY, 64) if context.quick else (model_config("ViT-Ti-16"), 128)
    results: dict[str, tuple[float, float]] = {}
    for where, device in (("CPU", torch.device("cpu")), ("device", context.device)):
        begin = time.perf_counter()
        losses, accuracy = _train(config, batch_size, steps, device)
        finite = all(map(math.isfinite, losses))
        tenth = max(1, steps // 10)
        first, last = statistics.mean(losses[:tenth]), statistics.mean(losses[-tenth:])
        passed = finite and last < 0.8 * first
        what = f"{where}: loss from {first:.3f} to {last:.3f}, {'all' if finite else 'NOT all'} finite"
        results[where] = last, accuracy
        context.row(
            where=where, steps=steps, first_loss=first, last_loss=last, top1=accuracy,
            seconds=time.perf_counter() - begin, result=context.judge(passed, what),
        )  # fmt: skip
    (cpu_loss, cpu_top1), (own_loss, own_top1) = results.values()
    allowed = cpu_loss * (1 + LOSS_MARGIN) + LOSS_FLOOR
    passed = own_top1 >= cpu_top1 - ACCURACY_MARGIN and own_loss <= allowed
    what = (
        f"top-1 {own_top1:.1%} against {cpu_top1:.1%} (at most {ACCURACY_MARGIN:.0%} less), last loss {own_loss:.3f} "
        f"against {cpu_loss:.3f} (at most {allowed:.3f})"
    )
    context.row(where=what, result=context.judge(passed, what))


def _train(config: ModelConfig, batch_size: int, steps: int, device: torch.device) -> tuple[list[float], float]:
    """Each step's loss, and top-1 of fresh samples among the classes' captions."""
    classes, tokens = 2 * batch_size, 16
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(0, 256, (classes, tokens, config.image.patch_values), generator=generator)
    captions = torch.randint(1, 500, (classes, TEXT_TOKENS), generator=generator).to(torch.int32)
    positions = torch.arange(tokens, dtype=torch.int16).expand(batch_size, tokens).contiguous()

    def batch(labels: torch.Tensor) -> Batch:
        noise = torch.randn((batch_size, tokens, config.image.patch_values), generator=generator) * 60
        return Batch(
            patches=(pictures[labels] + noise).clamp(0, 255).to(torch.uint8),
            positions=positions,
            grid=(4, 4),
            caption_ids=captions[labels],
            valid=torch.ones(batch_size, dtype=torch.bool),
            sample_ids=labels,
        )

    labels = torch.randint(0, classes, (batch_size,), generator=generator)
    precision = "fp32" if device.type == "cpu" else "bf16"
    stepper = Stepper(config, [batch(labels)], device=device, precision=precision)
    losses: list[torch.Tensor] = []
    for step in range(steps):
        optim.set_learning_rate(stepper.optimizer, 1e-3 * min(1.0, (step + 1) / 10))
        # Without two of a class in a batch, which would be each other's false negatives.
        losses.append(stepper.step(batch(torch.randperm(classes, generator=generator)[:batch_size])))
    hits = 0
    with torch.no_grad():
        texts = stepper.model.encode_text(captions.to(device))
        for start in range(0, classes, batch_size):
            truth = torch.arange(start, start + batch_size)
            held_out = batch(truth).to(device)
            images = stepper.model.encode_image(held_out.patches, held_out.positions)
            hits += int(((images @ texts.T).argmax(dim=1).cpu() == truth).sum())
    return torch.stack(losses).float().tolist(), hits / classes


def step_table(context: Context) -> None:
    """images/s and MFU of each model and length at the biggest batch that fits, found by doubling.

    Tokens are kept at random of a 224 px grid, so that one model serves all lengths; their number is what costs.
    """
    for config in (TINY,) if context.quick else tuple(map(model_config, MODELS)):
        if not context.enough_time(0 if context.quick else 20, f"{config.name} and what comes after"):
            return
        stepper = _stepper(context, config, 8 if context.quick else FIRST_BATCH, 16)
        for tokens in (16,) if context.quick else TOKENS:
            what = f"{config.name}, {tokens} tokens"
            if not context.enough_time(0 if context.quick else 8, f"{what}, and what comes after"):
                return
            batch, limit = _biggest_batch(context, stepper, config, tokens)
            if batch is None:
                context.row(model=config.name, tokens=tokens, result=context.judge(False, f"{what}: {limit}"))
                continue
            _row(context, stepper, config, tokens, batch, limit)
        del stepper
        _free(context)


def _stepper(context: Context, config: ModelConfig, batch_size: int, tokens: int) -> Stepper:
    batches = _batches(context, config, batch_size, tokens)
    # Initialised where it will be: of H/14 a CPU draws the weights for half a minute.
    with context.device:
        return Stepper(config, batches, device=context.device, precision="bf16" if context.on_gpu else "fp32")


def _batches(context: Context, config: ModelConfig, batch_size: int, tokens: int) -> list[Batch]:
    patch = config.image.patch
    side = 4 if context.quick else 224 // patch
    geometry = token_geometry(tokens, image_reduction="random", image_size=side * patch, patch=patch)
    batches = made_batches(config, geometry, batch_size, TEXT_TOKENS, count=1)
    return [batch.to(context.device) for batch in batches]


def _use(context: Context, stepper: Stepper, config: ModelConfig, batch_size: int, tokens: int) -> None:
    stepper.batches = []
    stepper.batches = _batches(context, config, batch_size, tokens)
    stepper.batch_size = batch_size


def _biggest_batch(context: Context, stepper: Stepper, config: ModelConfig, tokens: int) -> tuple[int | None, str]:
    """The largest power of two that a step has memory for, and what ended the search."""
    found, batch = None, 8 if context.quick else FIRST_BATCH
    last = 16 if context.quick else LARGEST_BATCH
    while batch <= last:
        with _memory_may_end(context, stepper) as ended:
            _use(context, stepper, config, batch, tokens)
            stepper.run(1)
        if ended:
            return found, f"out of memory at {batch:,}"
        found, batch = batch, 2 * batch
    return found, f"{last:,} is the largest tried"


@contextmanager
def _memory_may_end(context: Context, stepper: Stepper) -> Generator[list[str]]:
    """Yields a list that is not empty afterwards where memory ran out inside."""
    ended: list[str] = []
    try:
        yield ended
    except torch.OutOfMemoryError as error:
        ended.append(str(error))
    if ended:
        stepper.batches = []
        stepper.optimizer.zero_grad(set_to_none=True)
        _free(context)


def _free(context: Context) -> None:
    gc.collect()
    if context.on_gpu:
        torch.cuda.empty_cache()


def _row(context: Context, stepper: Stepper, config: ModelConfig, tokens: int, batch: int, limit: str) -> None:
    _use(context, stepper, config, batch, tokens)
    stepper.run(1)
    if context.on_gpu:
        torch.cuda.reset_peak_memory_stats(context.device)
    turns = [stepper.run(1 if context.quick else 3) for _ in range(3)]
    rate = statistics.median(turn.images_per_s for turn in turns)
    memory = stepper.peak_memory_bytes()
    stepper.batches = []
    stepper.optimizer.zero_grad(set_to_none=True)
    _free(context)
    meter = GemmMeter(gemms(config, min(batch, 512), tokens, TEXT_TOKENS), context.device, context.dtype)
    meter.measure()
    gemm = statistics.median(meter.measure().model for _ in range(3))
    gflop = 3 * sum(gflops_per_pair(config, tokens, TEXT_TOKENS))
    sheet = data_sheet_gflop_per_s(context.device, context.dtype)
    finite = bool(torch.stack([weight.isfinite().all() for weight in stepper.model.parameters()]).all())
    context.row(
        model=config.name,
        tokens=tokens,
        text_tokens=TEXT_TOKENS,
        batch=batch,
        ended_by=limit,
        images_per_s=rate,
        step_ms=1e3 * batch / rate,
        tflop_per_s=rate * gflop / 1e3,
        mfu_of_data_sheet=None if sheet is None else rate * gflop / sheet,
        gemm_tflop_per_s=gemm / 1e3,
        mfu_of_gemm_rate=rate * gflop / gemm,
        peak_gib=memory / 2**30,
        result=context.judge(finite, f"{config.name}, {tokens} tokens: a weight is not finite after the steps"),
    )


def compile_table(context: Context) -> None:
    """The step with and without torch.compile, in turns."""
    for name, tokens, batch in (("ViT-B-16", 16, 2048), ("ViT-L-14", 36, 512)):
        if not context.enough_time(40, f"{name} at {tokens} tokens and what comes after"):
            return
        config = model_config(name)
        stepper = _stepper(context, config, batch, tokens)
        twin = stepper.compiled_twin()
        stepper.run(2)
        begin = time.perf_counter()
        twin.run(2)
        first_s = time.perf_counter() - begin
        pairs = [(stepper.run(5), twin.run(5)) for _ in range(3)]
        context.row(
            model=name,
            tokens=tokens,
            batch=batch,
            images_per_s=statistics.median(one.images_per_s for one, _ in pairs),
            compiled_images_per_s=statistics.median(other.images_per_s for _, other in pairs),
            speed=statistics.median(other.images_per_s / one.images_per_s for one, other in pairs),
            first_steps_s=first_s,
            result="measured",
        )
        del stepper, twin
        _free(context)
