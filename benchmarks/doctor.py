"""What holds a run up on this machine, and the one change that helps most: `python -m benchmarks.doctor --data DIR`.

Takes train.py's flags. Short probes, under a minute in all on an idle machine: storage, the loader by stage with each
decoder, the model on cached batches, both together, memory, bad samples, start-up. Nothing is trained or kept; only an
index that is missing is built and stays. What the numbers mean: docs/doctor.md.
"""

import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# As train.py: set before torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from model.clip import gflops_per_pair
from model.presets import ModelConfig, model_config
from pipeline.command import exit_code
from pipeline.loader import DecoderName
from pipeline.order import default_lanes
from training.config import Config, parse, resolved
from training.data import batch_settings, open_data
from training.distributed import World
from training.rates import peak_flops

from .doctor_probes import Bench
from .doctor_rules import Advice, Readings, advise

SECONDS = 30.0
_SLOW_CPU_GFLOP_PER_S = 40.0
"""By which a batch is chosen whose step takes seconds, not minutes."""
_LEAST_BATCH = 16
"""In less, the optimiser would weigh as much as the model."""
_LARGEST_PROBE = 1024


@exit_code
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the report."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    names = {argument.partition("=")[0] for argument in given}
    # How long the run is changes nothing here.
    length = [] if names & {"--steps", "--samples", "--preset"} else ["--steps", "1000000"]
    stages = parse([*length, *given], __doc__ or "")
    config = resolved(stages[0], cuda=torch.cuda.is_available())
    if len(stages) > 1:
        print(f"stage     {stages[0].stage}, the first of {len(stages)}; --stage chooses another")
    print(examine(config))


def examine(config: Config, seconds: float = SECONDS) -> str:
    """Returns the report on a resolved config: what was measured, the bottleneck, and the change that helps most.

    seconds: about how long the probes take, start-up not counted. Raises ValueError where the data cannot be used.
    """
    interval = sys.getswitchinterval()
    try:
        readings, notes = probe(config, seconds)
    finally:
        sys.setswitchinterval(interval)
    return report(readings, notes, advise(readings))


def probe(config: Config, seconds: float) -> tuple[Readings, list[str]]:
    """Returns what was measured, and lines on what was not or could not be."""
    from train import SWITCH_INTERVAL

    sys.setswitchinterval(SWITCH_INTERVAL)
    share, notes = seconds / 10, _load_notes()
    encoders, device = model_config(config.model), torch.device(config.device)
    import_s = _import_seconds()
    batch_size = _probed_batch(config, encoders)
    probed = replace(config, batch_size=batch_size, lanes=default_lanes(batch_size))
    begin = time.perf_counter()
    index, order = open_data(probed, World())
    first_s, begin = time.perf_counter() - begin, time.perf_counter()
    index, order = open_data(probed, World())
    again_s = time.perf_counter() - begin
    settings = batch_settings(config, encoders)

    bench = Bench(config, index, order, settings, notes)
    storage = bench.storage(share)
    own = bench.loader(settings.decoder, 2 * share)
    assert own is not None
    other_name: DecoderName = "turbo" if settings.decoder == "dali" else "dali"
    other = bench.loader(other_name, share)
    sampled = bench.sample()
    shrunk = bench.shrunk(sampled, own)
    step = bench.step(encoders, device, 2 * share)
    joint_rate, wait = bench.joint(step.stepper, 2 * share)
    on_gpu = device.type == "cuda"
    flops, peak = 3e9 * sum(gflops_per_pair(encoders, config.tokens, config.text_tokens)), peak_flops(device)
    for rejection in bench.rejected[:3]:
        notes.append(f"bad: {rejection}")
    readings = Readings(
        device="cuda" if on_gpu else "cpu",
        cores=_cores(),
        threads=config.threads,
        workers=config.workers,
        prefetch=config.prefetch,
        batch_size=config.batch_size,
        probed_batch=step.batch_size,
        decoder=settings.decoder,
        loader_rate=own.rate,
        loader_per_cpu_s=own.per_cpu_s,
        stages_us=own.stages_us,
        other_decoder=None if other is None else other_name,
        other_loader_rate=None if other is None else other.rate,
        step_rate=step.rate,
        step_per_cpu_s=step.per_cpu_s,
        doubled_step_rate=step.doubled_rate,
        joint_rate=joint_rate,
        data_wait_fraction=wait,
        storage_mb_per_s=storage,
        image_bytes=sampled.image_bytes,
        short_side=sampled.short_side,
        image_size=config.geometry.image_size,
        shrunk_side=None if shrunk is None else shrunk.side,
        shrunk_per_cpu_s=None if shrunk is None else shrunk.per_cpu_s,
        shrunk_bytes=None if shrunk is None else shrunk.image_bytes,
        mfu=None if peak is None else step.rate * flops / peak,
        precision=config.precision,
        compiled=config.compile,
        memory_gib=step.memory_gib,
        memory_needed_gib=step.needed_gib(config.batch_size // config.accumulate),
        memory_there_gib=torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
        accumulate=config.accumulate,
        bad_share=bench.bad / bench.seen,
        max_bad_fraction=config.max_bad_fraction,
        rejected_share=1 - index.num_usable / index.num_samples,
        import_s=import_s,
        index_first_s=first_s,
        index_again_s=again_s,
    )
    return readings, notes


def report(r: Readings, notes: Sequence[str], advice: Advice) -> str:
    """Returns the table of readings, the bottleneck and the change."""
    total = sum(r.stages_us.values()) or 1.0
    stages = ", ".join(f"{name} {us / total:.0%}" for name, us in r.stages_us.items() if us / total >= 0.005)
    makers = f"{r.workers} workers" if r.workers else f"{r.threads} threads" if r.threads > 1 else "1 thread"
    storage = (
        "not measured: the shards are remote"
        if r.storage_mb_per_s is None or r.storage_rate is None
        else f"{r.storage_mb_per_s:,.0f} MB/s, {r.storage_rate:,.0f} img/s at {r.image_bytes / 1e3:.1f} KB each"
    )
    other = "" if r.other_loader_rate is None else f"{r.other_loader_rate:,.0f} img/s"
    mfu = "" if r.mfu is None else f", {r.mfu:.0%} of the device's peak"
    doubled = "" if r.doubled_step_rate is None else f", {r.doubled_step_rate:,.0f} at twice that"
    needed = ""
    if r.memory_needed_gib is not None:
        needed = f", about {r.memory_needed_gib:.1f} at {r.batch_size:,}, of {r.memory_there_gib:.1f}"
    rows = [
        ("start", f"imports {r.import_s:.1f} s; index {r.index_first_s:.1f} s, and {r.index_again_s:.1f} s once built"),
        ("storage", storage),
        ("images", f"median short side {r.short_side:,.0f} px; {r.image_size} px are asked for"),
        (f"loader, {r.decoder}", f"{r.loader_rate:,.0f} img/s by {makers}, {r.loader_per_cpu_s:,.0f} per CPU second"),
        ("  by stage", stages),
        (f"loader, {r.other_decoder}", other),
        ("model", f"{r.step_rate:,.0f} img/s at {r.probed_batch:,} of {r.batch_size:,}{doubled}{mfu}"),
        ("both", f"{r.joint_rate:,.0f} img/s; {r.data_wait_fraction:.0%} of the time waiting for data"),
        ("memory", f"{r.memory_gib:.1f} GiB at {r.probed_batch:,}{needed}"),
        ("samples", f"{r.bad_share:.2%} bad; {r.rejected_share:.2%} left out when the index was built"),
    ]
    gain = "" if advice.gain is None else f" (about {advice.gain:.1f} times the rate)"
    return "\n".join(
        [
            *(f"{name:<15} {text}" for name, text in rows if text),
            *notes,
            "",
            f"{'bottleneck':<15} {advice.bottleneck}",
            f"{'change':<15} {advice.change}{gain}",
            f"{'because':<15} {advice.why}",
        ]
    )


def _probed_batch(config: Config, encoders: ModelConfig) -> int:
    """The config's, or on a CPU a power of two whose step takes about two seconds on a slow one."""
    part = config.batch_size // config.accumulate
    if config.device == "cuda":
        return min(part, _LARGEST_PROBE)
    gflop = 3 * sum(gflops_per_pair(encoders, config.tokens, config.text_tokens))
    affordable = 2 ** int(math.log2(max(1.0, 2 * _SLOW_CPU_GFLOP_PER_S / gflop)))
    return min(part, max(_LEAST_BATCH, affordable), _LARGEST_PROBE)


def _load_notes() -> list[str]:
    """Says so where others use the machine: rates by the clock are then theirs too."""
    load, cores = os.getloadavg()[0], _cores()
    if load <= cores / 2:
        return []
    return [f"load average {load:.1f} on {cores} cores: others use this machine, so that rates by the clock say little"]


def _import_seconds() -> float:
    """What train.py imports, in a fresh process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import train"], cwd=Path(__file__).parents[1], check=False)
    return time.perf_counter() - begin


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    sys.exit(main())
