"""What the doctor concludes from what it measured: pure, Readings in, the one change that helps most out.

Each rule looks at the numbers for itself and says what its change would give; the largest gain is the advice. What
would stop the run (memory, bad samples) comes before all gains.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

WAIT_LIMIT = 0.10
"""Share of the time in waiting for data from which on the loader is looked at."""
WORTH = 1.05
"""A smaller gain is within what such short probes cannot tell."""
_ROOM = 1.1
"""What the loader should give more than the model takes."""
_MEMORY_SHARE = 0.95


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What the probes measured, of one process; rates in images a second."""

    device: Literal["cpu", "cuda"]
    cores: int
    threads: int
    workers: int
    prefetch: int
    batch_size: int
    """Asked for."""
    probed_batch: int
    """What the rates were measured at."""
    decoder: str
    loader_rate: float
    """By the clock, with threads or workers as given."""
    loader_per_cpu_s: float
    """Per second of CPU time: what one thread gives that waits for nothing."""
    stages_us: dict[str, float] = field(default_factory=dict[str, float])
    """CPU time of an image in each stage."""
    other_decoder: str | None = None
    other_loader_rate: float | None = None
    step_rate: float
    """The model alone, on cached batches."""
    step_per_cpu_s: float
    doubled_step_rate: float | None = None
    """At twice the batch; measured on a GPU."""
    joint_rate: float
    """Loader and model together."""
    data_wait_fraction: float
    storage_mb_per_s: float | None = None
    """Of reads as the loader does them, by one thread, not from the page cache; None where the shards are remote."""
    image_bytes: float
    short_side: float
    """Median, in pixels."""
    image_size: int
    shrunk_side: int | None = None
    """Short side at which copies would still be large enough; None where the images are hardly larger."""
    shrunk_per_cpu_s: float | None = None
    """loader_per_cpu_s with such copies, from decoding some made in memory."""
    shrunk_bytes: float | None = None
    mfu: float | None = None
    precision: str = "fp32"
    compiled: bool = False
    memory_gib: float = 0.0
    """At its most, at the probed batch."""
    memory_needed_gib: float | None = None
    """At the batch asked for, estimated from two batches; None on a CPU."""
    memory_there_gib: float | None = None
    accumulate: int = 1
    bad_share: float = 0.0
    """Of the samples in the probes' batches."""
    max_bad_fraction: float = 0.01
    rejected_share: float = 0.0
    """Of all samples, when the index was built: never drawn."""
    import_s: float = 0.0
    index_first_s: float = 0.0
    index_again_s: float = 0.0

    @property
    def storage_rate(self) -> float | None:
        """Images a second that storage gives."""
        return None if self.storage_mb_per_s is None else self.storage_mb_per_s * 1e6 / self.image_bytes

    @property
    def input_bound(self) -> bool:
        """Whether the loader is what the model waits for."""
        return self.loader_rate < self.step_rate or self.data_wait_fraction > WAIT_LIMIT

    def attainable(self, loader_rate: float, loader_per_cpu_s: float) -> float:
        """Returns the rate of both together at best: the lesser, and on a CPU no more than the cores can do of both."""
        lesser = min(loader_rate, self.step_rate)
        if self.device == "cuda":
            return lesser
        return min(lesser, self.cores / (1 / loader_per_cpu_s + 1 / self.step_per_cpu_s))


@dataclass(frozen=True)
class Advice:
    """A change and what is behind it."""

    bottleneck: str
    change: str
    """What to do, as flags or a command."""
    why: str
    """The numbers."""
    gain: float | None
    """The run's rate after it, as a multiple; None where that was not measured."""
    urgent: bool = False
    """The run would not last without it."""


def advise(readings: Readings) -> Advice:
    """Returns the one change that helps most."""
    found = [advice for rule in RULES if (advice := rule(readings)) is not None]
    urgent = [advice for advice in found if advice.urgent]
    if urgent:
        return urgent[0]
    measured = [advice for advice in found if advice.gain is not None and advice.gain >= WORTH]
    if measured:
        return max(measured, key=lambda advice: advice.gain or 0)
    return next((advice for advice in found if advice.gain is None), _nothing(readings))


def memory(r: Readings) -> Advice | None:
    """The batch does not fit."""
    if r.memory_needed_gib is None or r.memory_there_gib is None:
        return None
    limit = _MEMORY_SHARE * r.memory_there_gib
    if r.memory_needed_gib <= limit:
        return None
    parts = 2 ** math.ceil(math.log2(r.memory_needed_gib / limit)) * r.accumulate
    why = f"a batch of {r.batch_size:,} needs about {r.memory_needed_gib:.0f} GiB, {r.memory_there_gib:.0f} are there"
    return Advice("memory", f"--accumulate {parts} (or --grad-checkpointing)", why, None, urgent=True)


def bad_samples(r: Readings) -> Advice | None:
    """More samples are bad than the run puts up with."""
    if r.bad_share <= r.max_bad_fraction:
        return None
    return Advice(
        "bad samples",
        "mend or remove the shards named above, and run this again",
        f"{r.bad_share:.1%} of the samples cannot be used, over --max-bad-fraction {r.max_bad_fraction:g}: "
        "the run would stop",
        None,
        urgent=True,
    )


def storage(r: Readings) -> Advice | None:
    """Shards come too slowly for the model."""
    rate = r.storage_rate
    readers = max(r.threads, r.workers, 1)
    if rate is None or r.storage_mb_per_s is None or rate * readers >= r.step_rate:
        return None
    why = (
        f"storage gives {r.storage_mb_per_s:,.0f} MB/s to a thread: at {r.image_bytes / 1e3:.1f} KB an image "
        f"{rate * readers:,.0f} img/s to {_threads(readers)}, the model takes {r.step_rate:,.0f}"
    )
    if r.shrunk_side is not None and r.shrunk_bytes is not None and r.shrunk_bytes < 0.7 * r.image_bytes:
        smaller = r.image_bytes / r.shrunk_bytes
        gain = min(r.step_rate, rate * readers * smaller) / min(r.step_rate, rate * readers)
        return Advice("storage", _shrink(r.shrunk_side), f"{why}; copies are {smaller:.1f} times smaller", gain)
    gain = r.step_rate / (rate * readers)
    return Advice("storage", "copy the shards to a faster disk, local to this machine", why, gain)


def threads(r: Readings) -> Advice | None:
    """The loader's threads are too few, and cores are idle."""
    at_once = r.workers or r.threads
    if not r.input_bound or r.loader_rate < 0.6 * min(at_once, r.cores) * r.loader_per_cpu_s:
        return None
    if r.device == "cpu":
        return _threads_beside_a_cpu_step(r)
    wanted = min(math.ceil(_ROOM * r.step_rate / r.loader_per_cpu_s), max(1, r.cores - 1))
    if wanted <= at_once:
        return None
    flag = "--workers" if r.workers else "--threads"
    why = (
        f"the loader gives {r.loader_per_cpu_s:,.0f} img/s a thread, {r.loader_rate:,.0f} with {at_once}; "
        f"the model takes {r.step_rate:,.0f}; {r.cores} cores are there"
    )
    return Advice(_stage_of(r), f"{flag} {wanted}", why, min(r.step_rate, wanted * r.loader_per_cpu_s) / r.loader_rate)


def _threads_beside_a_cpu_step(r: Readings) -> Advice | None:
    # Loader and step share the cores: a thread more helps while some of them wait.
    wanted = min(r.threads + 1, r.cores)
    best = r.attainable(wanted * r.loader_per_cpu_s, r.loader_per_cpu_s)
    if r.workers or wanted == r.threads or best <= r.joint_rate:
        return None
    why = (
        f"the model waits {r.data_wait_fraction:.0%} of the time; all {r.cores} cores together could do "
        f"{best:,.0f} img/s, {r.joint_rate:,.0f} are reached"
    )
    return Advice(_stage_of(r), f"--threads {wanted}", why, best / r.joint_rate)


def workers(r: Readings) -> Advice | None:
    """Threads hold each other up: Python's lock, as storage does not."""
    reachable = min(r.threads, r.cores) * r.loader_per_cpu_s
    if r.device == "cpu" or r.workers or r.threads == 1 or not r.input_bound or r.loader_rate >= 0.6 * reachable:
        return None
    if r.decoder == "dali":  # its own threads, or the GPU, decode
        return None
    if r.storage_rate is not None and r.storage_rate * r.threads < 1.2 * r.loader_rate:
        return None
    why = (
        f"{r.threads} threads give {r.loader_rate:,.0f} img/s, {r.loader_rate / reachable:.0%} of "
        f"{r.threads} times one; the model takes {r.step_rate:,.0f}"
    )
    return Advice(
        "Python's lock", f"--workers {r.threads}", why, min(r.step_rate, reachable) / min(r.step_rate, r.loader_rate)
    )


def shrink(r: Readings) -> Advice | None:
    """Images are decoded from far more pixels than are kept."""
    if r.shrunk_side is None or r.shrunk_per_cpu_s is None or not r.stages_us:
        return None
    total = sum(r.stages_us.values())
    share = r.stages_us.get("decode", 0.0) / total if total else 0.0
    if share < 0.5 or not _loader_matters(r):
        return None
    faster = r.shrunk_per_cpu_s / r.loader_per_cpu_s
    before = r.attainable(r.loader_rate, r.loader_per_cpu_s)
    gain = r.attainable(r.loader_rate * faster, r.shrunk_per_cpu_s) / before
    why = (
        f"decoding takes {share:.0%} of the loader's time: the median image is {r.short_side:,.0f} px, {r.image_size} "
        f"are kept; copies of {r.shrunk_side} px give {r.shrunk_per_cpu_s:,.0f} img/s a thread instead of "
        f"{r.loader_per_cpu_s:,.0f}"
    )
    return Advice("decoding", _shrink(r.shrunk_side), why, gain)


def other_decoder(r: Readings) -> Advice | None:
    """The other decoder is faster here."""
    if r.other_decoder is None or r.other_loader_rate is None or not _loader_matters(r):
        return None
    faster = r.other_loader_rate / r.loader_rate
    if faster < 1.2:
        return None
    before = r.attainable(r.loader_rate, r.loader_per_cpu_s)
    gain = r.attainable(r.other_loader_rate, r.loader_per_cpu_s * faster) / before
    why = f"{r.decoder} gives {r.loader_rate:,.0f} img/s, {r.other_decoder} {r.other_loader_rate:,.0f}"
    return Advice("decoding", f"--decoder {r.other_decoder}", why, gain)


def larger_batch(r: Readings) -> Advice | None:
    """The GPU waits for Python to launch its kernels."""
    if r.device == "cpu" or r.doubled_step_rate is None or r.probed_batch < r.batch_size // r.accumulate:
        return None
    gain = min(r.doubled_step_rate, r.loader_rate) / min(r.step_rate, r.loader_rate)
    if r.accumulate > 1:
        change = f"--accumulate {r.accumulate // 2}"
    else:
        change = f"--batch-size {2 * r.batch_size} (another run: the learning rate goes with it)"
    why = f"the step does {r.step_rate:,.0f} img/s at {r.probed_batch:,}, {r.doubled_step_rate:,.0f} at twice that"
    return Advice("launching of kernels", change, why, gain)


def overlap(r: Readings) -> Advice | None:
    """Both are fast enough alone and not together."""
    best = r.attainable(r.loader_rate, r.loader_per_cpu_s)
    if r.data_wait_fraction <= WAIT_LIMIT or r.loader_rate < _ROOM * r.step_rate or r.joint_rate >= 0.85 * best:
        return None
    why = f"loader {r.loader_rate:,.0f} and model {r.step_rate:,.0f} img/s alone, {r.joint_rate:,.0f} together"
    return Advice("batches come unevenly", f"--prefetch {2 * max(r.prefetch, 1)}", why, best / r.joint_rate)


def precision(r: Readings) -> Advice | None:
    """Tensor cores do twice as much in bf16 as in TF32."""
    if r.device == "cpu" or r.precision == "bf16" or r.input_bound:
        return None
    return Advice("the model, in float32", "--precision bf16", _mfu(r), None)


def compiled(r: Readings) -> Advice | None:
    """The model is the limit and is not compiled."""
    if r.device == "cpu" or r.compiled or r.input_bound:
        return None
    why = f"{_mfu(r)}; what it gives is measured by `python -m benchmarks.step --parts`"
    return Advice("the model", "--compile", why, None)


RULES: Sequence[Callable[[Readings], Advice | None]] = (
    memory, bad_samples, storage, threads, workers, shrink, other_decoder, larger_batch, overlap, precision, compiled,
)  # fmt: skip


def _nothing(r: Readings) -> Advice:
    lesser = min(r.loader_rate, r.step_rate)
    if r.step_rate <= r.loader_rate:
        return Advice("the model", "nothing: the loader keeps up", _mfu(r), None)
    return Advice(
        _stage_of(r), "nothing that the probes can tell",
        f"loader {r.loader_rate:,.0f} and model {r.step_rate:,.0f} img/s alone, {r.joint_rate:,.0f} together, "
        f"{r.joint_rate / lesser:.0%} of the lesser", None,
    )  # fmt: skip


def _loader_matters(r: Readings) -> bool:
    """Whether a faster loader can make the run faster: it is waited for, or takes the model's cores."""
    taken = 1 / r.loader_per_cpu_s / (1 / r.loader_per_cpu_s + 1 / r.step_per_cpu_s)
    return r.input_bound or (r.device == "cpu" and taken > 0.05)


def _stage_of(r: Readings) -> str:
    stage = max(r.stages_us, key=lambda name: r.stages_us[name], default="decode")
    return f"the loader ({stage} most of all)"


def _mfu(r: Readings) -> str:
    mfu = "" if r.mfu is None else f", {r.mfu:.0%} of the device's peak"
    return f"the model does {r.step_rate:,.0f} img/s{mfu}; the loader gives {r.loader_rate:,.0f}"


def _shrink(side: int) -> str:
    return f"python ingest.py shrink SHARDS --out SHARDS-{side} --short-side {side}, and --data SHARDS-{side}"


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"
