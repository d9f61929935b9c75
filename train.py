"""Trains a CLIP on short token sequences: `python train.py --tokens 16`. The same command again resumes.

The loop stands here, top to bottom: next batch, forward, loss, backward, step, log. What it is made of is in
pipeline/ (batches), model/ (encoders, loss) and training/ (the rest).
"""

import contextlib
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

# OpenMP threads that spin while they wait take a core from the thread that makes batches; torch reads it as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from evaluation.classes import CLASS_NAMES_FILE
from model.clip import CLIP, gflops_per_pair
from model.loss import info_nce
from model.presets import to_json
from pipeline.files import only_writer, write_text
from pipeline.index import Index, open_index
from pipeline.ingest.emoji import finished, make
from pipeline.ingest.recipe import load
from pipeline.loader import Loader, Settings
from pipeline.mixture import Mixture, by_source, make_order
from pipeline.order import Order
from training import checkpoint, optim
from training.config import STARTER, Config, attention_backends, parse, record, refuse_other_run, resolved
from training.initial import recorded_encoders, starting_encoders
from training.metrics import LEDGER, METRICS, REJECTED, BadSampleBudget, RunLog, StepTimer, ids_hash
from training.schedule import learning_rate
from validate import ShardSet, local_folder, zero_shot_accuracy

INTERRUPTED = 130
"""Exit code after Ctrl-C or SIGTERM, with a checkpoint saved."""
SWITCH_INTERVAL = 0.0005
"""Seconds for which a loader thread may keep the GIL from the step; Python's own 5 ms are 2 % of a small step."""
NON_FINITE_LIMIT = 20
"""Steps in a row with a loss that is not finite before the run stops."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 finished, 2 for what the user can mend, 130 interrupted (after a checkpoint, if any)."""
    try:
        config = parse(sys.argv[1:] if arguments is None else arguments, __doc__ or "")
        sys.setswitchinterval(SWITCH_INTERVAL)
        config = resolved(config, cuda=torch.cuda.is_available())
        with only_writer(config.run_folder):
            return train(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted before the first step; the same command begins again", file=sys.stderr)
        return INTERRUPTED


def train(config: Config) -> int:
    """Trains, or goes on training, as a resolved config says. Returns the exit code."""
    run = config.run_folder
    last = checkpoint_to_resume(config)
    if last is not None and last.state["step"] >= config.total_steps:
        print(f"{run} is finished: {last.state['step']:,} steps, {last.state['samples_seen']:,} pairs; nothing to do")
        return 0
    make_starter(config)
    sources, shares = config.sources
    index = open_index(sources)
    assert config.lanes is not None
    assert config.warmup_samples is not None
    assert config.decoder != "auto"
    order = make_order(
        index.shard_sizes, index.source_shards, shares, batch_size=config.batch_size, seed=config.seed,
        lanes=config.lanes, resampled=config.resampled,
    )  # fmt: skip
    geometry = config.geometry
    encoders, weights = (recorded_encoders(run), None) if last else starting_encoders(config)
    settings = Settings(
        geometry,
        config.text_tokens,
        config.decoder,
        crop=config.crop,
        colour=config.colour,
        captions=config.captions,
        text_reduction=config.text_reduction,
        tokenizer=encoders.text.tokenizer,
        vocabulary=config.vocabulary,
        seed=config.seed,
        device_id=(torch.cuda.current_device() if config.device == "cuda" else None),
    )
    loader = Loader(index, order, settings)
    held_out = None
    if config.eval_data:
        held_out = ShardSet(local_folder("--eval-data", config.eval_data), settings)
        if not held_out.names:
            raise ValueError(f"--eval-data {config.eval_data} has no {CLASS_NAMES_FILE}; give a shard set with classes")

    torch.manual_seed(config.seed)
    device = torch.device(config.device)
    model = CLIP(encoders, grid=geometry.grid, text_tokens=config.text_tokens, attention=config.attention)
    if weights is not None:
        model.load_state_dict(weights)
    model.to(device)
    forward = torch.compile(model) if config.compile else model
    optimizer = optim.build(model, weight_decay=config.weight_decay, beta2=config.beta2, decayed=encoders.decayed)
    describe(config, model, index, order)

    step = samples_seen = 0
    if last is None:
        clear(run)
    else:
        if last.state["index_digest"] != index.digest:
            raise ValueError(f"{run} was trained on other data: the shards changed since; use another --out")
        # With weights, where one source ends and the next begins is part of the order.
        if shares and last.state.get("source_shards") != list(index.source_shards):
            raise ValueError(
                f"{run} was trained on sources of other shards: some moved between them; use another --out"
            )
        model.load_state_dict(last.model_tensors())
        optim.load_state_tensors(model, optimizer, last.optimizer_tensors())
        step, samples_seen = last.state["step"], last.state["samples_seen"]
        loader.known_bad.update({int(sample): reason for sample, reason in last.state["known_bad"].items()})
        print(f"resuming at step {step:,} from {last.path}")
    write_text(run / "config.json", json.dumps({**record(config), "encoders": to_json(encoders)}, indent=1) + "\n")
    log = RunLog(run, step)

    def save() -> None:
        known_bad = {str(sample): reason for sample, reason in sorted(dict(loader.known_bad).items())}
        state = {
            "samples_seen": samples_seen,
            "index_digest": index.digest,
            "source_shards": index.source_shards,
            "known_bad": known_bad,
        }
        tensors = optim.state_tensors(model, optimizer)
        checkpoint.save(run, step, model.state_dict(), tensors, state, config.keep_checkpoints)

    timer, budget = StepTimer(), BadSampleBudget(config.max_bad_fraction)
    hashes: list[str] = []
    losses: list[torch.Tensor] = []
    non_finite = 0
    total_samples = config.total_steps * config.batch_size
    batches = loader.batches(step, config.total_steps, threads=config.threads, prefetch=config.prefetch)
    with StopSignal() as stop, contextlib.closing(batches):
        while step < config.total_steps:
            waiting = time.perf_counter()
            batch = next(batches)
            timer.waited(time.perf_counter() - waiting)
            batch = batch.to(device)

            rate = learning_rate(
                samples_seen, peak=config.lr, warmup_samples=config.warmup_samples, total_samples=total_samples
            )
            optim.set_learning_rate(optimizer, rate)
            with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
                image_features, text_features, logit_scale = forward(batch.patches, batch.positions, batch.caption_ids)
            loss = info_nce(image_features, text_features, logit_scale, batch.valid)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            model.clamp_logit_scale()

            step += 1
            samples_seen += config.batch_size
            ids = batch.sample_ids.numpy()
            hashes.append(ids_hash(ids))
            losses.append(loss.detach())
            log.rejections(step, batch.rejected)
            budget.add(len(ids), batch.rejected)
            if config.ledger:
                log.ledger(step, ids)

            ending = stop.asked or step == config.total_steps
            evaluating = held_out is not None and (step % config.eval_every == 0 or step == config.total_steps)
            saving = ending or step % config.checkpoint_every == 0
            if evaluating or saving or step % config.log_every == 0:
                # Reading losses waits for the device, so it is done here only.
                recent = torch.stack(losses).tolist()
                non_finite = count_non_finite(recent, non_finite, step)
                values: dict[str, Any] = {
                    "step": step,
                    "samples_seen": samples_seen,
                    "loss": sum(recent) / len(recent),
                    "lr": rate,
                    "logit_scale": float(logit_scale.detach()),
                    **timer.rates(len(recent) * config.batch_size),
                    "rejected": log.num_rejected,
                    "ledger": hashes,
                }
                if held_out is not None and evaluating:
                    values |= zero_shot_accuracy(model, held_out)
                log.metrics(values)
                print(log_line(values, config.total_steps, device), flush=True)
                hashes, losses = [], []
                # A model that has met a loss without a number must not push a good checkpoint out.
                if saving and not non_finite:
                    save()
                timer.restart()
            # Not stop.asked: a signal that came since has no checkpoint yet, and is answered after the next step.
            if ending and step < config.total_steps:
                print(f"interrupted at step {step:,}; the same command goes on from {checkpoint.name_of_newest(run)}")
                return INTERRUPTED
    print(f"finished: {step:,} steps, {samples_seen:,} pairs; {checkpoint.name_of_newest(run)}")
    return 0


def checkpoint_to_resume(config: Config) -> checkpoint.Checkpoint | None:
    """Returns the checkpoint to go on from, or None for a new run. Deletes nothing.

    Raises ValueError where the folder holds a run of other values, or only damaged checkpoints.
    """
    run = config.run_folder
    if config.resume == "never":
        return None
    recorded = run / "config.json"
    if not recorded.exists():
        if checkpoint.list_steps(run):
            raise ValueError(f"{run} has checkpoints but no config.json; use another --out, or --resume never")
        return None
    try:
        old = json.loads(recorded.read_text())
    except ValueError:
        raise ValueError(f"{recorded} is damaged; use another --out, or --resume never") from None
    refuse_other_run(old, config, run)
    last, passed_over = checkpoint.newest(run)
    for phrase in passed_over:
        print(f"passed over a damaged checkpoint: {phrase}", file=sys.stderr)
    if last is None and passed_over:
        raise ValueError(f"{run}: every checkpoint is damaged; --resume never starts anew")
    return last


def clear(run: Path) -> None:
    """Deletes what an older run left in the folder; only once all that can be refused has been checked."""
    if (run / checkpoint.FOLDER).exists():
        shutil.rmtree(run / checkpoint.FOLDER)
    for name in ("config.json", METRICS, REJECTED, LEDGER):
        (run / name).unlink(missing_ok=True)


def make_starter(config: Config) -> None:
    """Makes the starter data, or the rest of it, where a run asks for it."""
    folder = Path(STARTER).parent
    if STARTER in config.sources[0] and finished(folder) is None:
        print(f"--data {STARTER} is not there yet: making the starter (once, about a minute)", flush=True)
        make(load(Path(__file__).parent / "datasets" / "emoji.toml"), folder, os.cpu_count() or 1)


def describe(config: Config, model: CLIP, index: Index, order: Order | Mixture) -> None:
    """Prints every value that follows from others."""
    geometry, count = config.geometry, model.num_parameters()
    image, text = gflops_per_pair(model.config, config.tokens, config.text_tokens)
    rows, columns = geometry.grid
    print(f"run       {config.run_folder}")
    print(
        f"image     {config.tokens} of {rows * columns} tokens by {config.image_reduction}: {geometry.image_size} px, "
        f"grid {rows} x {columns}, patch {geometry.patch}"
    )
    print(f"text      {config.text_tokens} tokens by {config.text_reduction}")
    print(
        f"model     {config.model}: {count['total'] / 1e6:.2f} M parameters "
        f"(image {count['image'] / 1e6:.2f}, text {count['text'] / 1e6:.2f})"
    )
    print(f"compute   {3 * (image + text):.3f} GFLOPs a pair and step (forward: image {image:.3f}, text {text:.3f})")
    left_out = "".join(f", {count:,} {reason}" for reason, count in index.rejected.items())
    print(f"data      {index.num_usable:,} pairs in {len(index.shards)} shards{left_out}")
    for line in length_lines(config, index, order):
        print(line)
    for shard in index.shards:
        if shard.problem:
            print(f"          {shard.path}: {shard.problem}; {shard.usable:,} samples before that are used")
    on_gpu = config.decoder == "dali" and config.device == "cuda"
    by_tower = ", ".join(f"{backend} ({tower})" for tower, backend in attention_backends(config).items())
    print(
        f"device    {config.device}, {config.precision}; decoder {config.decoder} on the {'GPU' if on_gpu else 'CPU'}; "
        f"attention {by_tower}; {torch.get_num_threads()} threads",
        flush=True,
    )


def length_lines(config: Config, index: Index, order: Order | Mixture) -> list[str]:
    """How long the run is, and how often it goes through each source."""
    total = config.total_steps * config.batch_size
    pairs = [int(sizes.sum()) for sizes in by_source(index.shard_sizes, index.source_shards)]
    if isinstance(order, Mixture):
        by, length = "weight", "shares by weight"
        seen: list[float] = [*order.samples_by_source(config.total_steps)]
        left_out = [f", {source.left_out} pairs of each left out by the lanes" for source in order.sources]
        end = ""
    else:
        by, length = "size", f"{total / order.num_samples:.1f} epochs"
        seen, left_out = [total * own / index.num_usable for own in pairs], [""] * len(pairs)
        end = f", {order.left_out} pairs of each left out by them"
    lines = [
        f"source    {source}: {own:,} pairs in {shards:,} shards; {samples / total:.3%} of the run by {by}, "
        f"{samples / own:.1f} epochs{rest}"
        for source, own, shards, samples, rest in zip(
            config.sources[0], pairs, index.source_shards, seen, left_out, strict=True
        )
    ]
    return [
        *(lines if len(lines) > 1 else []),
        f"length    {config.total_steps:,} steps of {config.batch_size:,} pairs: {length}"
        f"{', resampled' if config.resampled else ''} in {order.lanes} lanes{end}",
    ]


def log_line(values: dict[str, Any], total_steps: int, device: torch.device) -> str:
    """One plain line that survives a log file."""
    left = (total_steps - values["step"]) * values["samples_seen"] / values["step"] / values["images_per_s"]
    parts = [
        f"step {values['step']}/{total_steps}",
        f"loss {values['loss']:.3f}",
        f"scale {values['logit_scale']:.1f}",
        f"{values['images_per_s']:,.0f} img/s",
        f"wait {values['data_wait_fraction']:.1%}",
        f"eta {left / 60:.0f}m" if left >= 60 else f"eta {left:.0f}s",
    ]
    if device.type == "cuda":
        parts.insert(5, f"mem {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    if values["rejected"]:
        parts.append(f"bad samples {values['rejected']}")
    if "zero_shot_top1" in values:
        parts.append(f"zero-shot {values['zero_shot_top1']:.1%}")
    return "  ".join(parts)


def count_non_finite(losses: list[float], before: int, step: int) -> int:
    """Returns how many of the newest losses in a row are not finite. Raises ValueError when they are too many."""
    for loss in losses:
        before = 0 if math.isfinite(loss) else before + 1
    if before >= NON_FINITE_LIMIT:
        raise ValueError(
            f"the loss was not finite for {before} steps up to step {step}; "
            "no checkpoint holds them: train again with a lower --lr in a new --out"
        )
    return before


class StopSignal:
    """Turns Ctrl-C and SIGTERM into a question the loop asks between steps; a second one ends the process at once."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopSignal":
        self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            os._exit(INTERRUPTED)
        self.asked = True
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"stopping after this step; once more to stop at once\n")


if __name__ == "__main__":
    sys.exit(main())
