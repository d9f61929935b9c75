"""Trains a CLIP on short token sequences: `python train.py --tokens 16`. The same command again resumes.
With `--doctor`, it says what would hold that run up on this machine, and trains nothing.

On several GPUs or processes: `torchrun --nproc-per-node 8 train.py ...`; on torchrun's --max-restarts it resumes too.
The loop stands here, top to bottom; what it is made of is in pipeline/ (batches), model/ (encoders) and training/.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import json
import os
import secrets
import sys
from typing import Any

from training.start import BEFORE_FIRST_STEP, before_torch, torch_is_there

# OpenMP threads that spin while they wait take a core from the thread that makes batches; torch reads it as it loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__":
    before_torch(sys.argv[1:], __doc__ or "")

import torch

from model.clip import CLIP
from model.loss import Features, contrastive_loss
from model.presets import to_json
from pipeline.files import write_text
from training import checkpoint, optim, resume
from training.accumulation import Inputs, accumulated
from training.checkpoint_writer import CheckpointWriter
from training.config import Config, parse, resolved, resolved_device
from training.data import batch_settings, open_data, open_loader
from training.describe import describe
from training.distributed import AgreedError, World, attempt, first_speaks, joined, place
from training.ema import Ema
from training.health import NON_FINITE_LIMIT, Advice, Skips, non_finite_run, out_of_memory
from training.heap import keep_freed_memory
from training.held_out import zero_shot_on
from training.initial import recorded_encoders, starting_encoders
from training.metrics import BadSampleBudget, RunLog, log_line
from training.parallel import backward, layout, over_ranks, spread
from training.peers import Peers, watched
from training.profile import Profile
from training.rates import Rates
from training.reporters import Reporters
from training.schedule import schedule_of
from training.signals import INTERRUPTED, StopSignal

SWITCH_INTERVAL = 0.0005
"""Seconds for which a loader thread may keep the GIL from the step; Python's own 5 ms are 2 % of a small step."""


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0 finished, 2 for what the user can mend, 3 where another rank was lost (training.peers),
    130 interrupted by Ctrl-C or SIGTERM (after a checkpoint, if any)."""
    given = sys.argv[1:] if arguments is None else arguments
    world, met = place(), False
    try:
        torch_is_there()
        with first_speaks(world), contextlib.ExitStack() as held:
            stages = parse(given, __doc__ or "")
            if stages[0].doctor:
                # Its probes are benchmarks, which a run never imports.
                from benchmarks.doctor import main as examined

                return examined(given)
            sys.setswitchinterval(SWITCH_INTERVAL)
            cuda = torch.cuda.is_available()
            held.enter_context(joined(world, resolved_device(stages[0].device, cuda=cuda)))
            peers = held.enter_context(watched(world, stages[0].peer_timeout))
            met, stop = True, StopSignal(among_others=world.size > 1)
            for number, stage in enumerate(stages, 1):
                if stage.stage is not None:
                    print(f"stage     {stage.stage}, {number} of {len(stages)}")
                if world.totals(stop.asked)[0]:
                    print("interrupted before this stage; the same command goes on with it")
                    return INTERRUPTED
                with contextlib.ExitStack() as of_stage:
                    with world.agreed():
                        kept = resume.left_open(stage, restarted=attempt() > 0) if world.is_first else {}
                    stage = dataclasses.replace(stage, **world.of_first(kept))
                    with world.agreed():
                        stage.check()
                        config = resolved(stage, cuda=cuda, world_size=world.size)
                        if world.is_first:
                            of_stage.enter_context(resume.held_folder(config.run_folder))
                    code = train(config, world, peers, stop)
                if code:
                    return code
                gc.collect()  # blocks refer to themselves: the next stage needs their memory
            return 0
    except (ValueError, OSError) as error:
        # Before the ranks have met, those of a host mostly stumble over the same.
        if world.is_first or (not isinstance(error, AgreedError) if met else world.local_rank == 0):
            print(f"error: {f'rank {world.rank}: ' if world.rank else ''}{error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: {out_of_memory(error, world.rank)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if world.is_first:
            print(BEFORE_FIRST_STEP, file=sys.stderr)
        return INTERRUPTED


def train(config: Config, world: World, peers: Peers, stop: StopSignal) -> int:
    """Trains, or goes on training, as a resolved config says; all ranks call it. Returns the exit code."""
    run, device = config.run_folder, torch.device(config.device)
    with world.agreed():
        last = resume.checkpoint_to_resume(config) if world.is_first else None
    last = world.of_first(last)
    if last is not None and last.state["step"] >= config.total_steps:
        print(resume.nothing_left(config, last.state))
        return 0
    index, order = open_data(config, world)
    with world.agreed():
        encoders, weights = (recorded_encoders(run), None) if last else starting_encoders(config)
        settings = batch_settings(config, encoders)
        measure = zero_shot_on(config, settings, world)
        if last is not None:
            resume.refuse_other_data(last.state, index.digest, index.source_shards if config.sources[1] else None, run)
    loader = open_loader(index, order, settings, world, traced=config.profile > 0)

    torch.manual_seed(config.seed)
    model = CLIP(
        encoders, grid=settings.geometry.grid, text_tokens=config.text_tokens, attention=config.attention,
        logit_bias=config.logit_bias,
    )  # fmt: skip
    if weights is not None:
        model.load_state_dict(weights)
    describe(config, model, index, order, layout(config, world))
    called = spread(model.to(device), config, world)
    optimizer = optim.build(
        model, weight_decay=config.weight_decay, beta2=config.beta2, eps=encoders.adam_eps, decayed=encoders.decayed
    )
    ema = Ema(model, config.ema) if config.ema else None

    step = samples_seen = skipped = in_a_row = 0
    if last is not None:
        model.load_state_dict(last.tensors_like("model", model.state_dict()))
        placed = dict(model.named_parameters())
        optim.load_state_tensors(model, optimizer, last.tensors_like("optimizer", placed))
        if ema is not None:
            ema.load(last.tensors_like("ema", placed))
        step, samples_seen = last.state["step"], last.state["samples_seen"]
        skipped = last.state.get("skipped_steps", 0)
        loader.known_bad.update({int(sample): reason for sample, reason in last.state["known_bad"].items()})
        print(f"resuming at step {step:,} from {last.path}")
    log = None
    with world.agreed():
        batches = loader.batches(
            step, config.total_steps, threads=config.threads, prefetch=config.prefetch, workers=config.workers
        )
        if world.is_first:
            recorded = {**resume.record(config), "encoders": to_json(encoders), resume.JOB: resume.job()}
            reporters = Reporters(config.report_to, run, recorded, step)
            if last is None:
                resume.clear(run)
            write_text(run / "config.json", json.dumps(recorded, indent=1) + "\n")
            log = RunLog(run, step, with_ids=config.ledger, reporters=reporters)

    def encode(inputs: Inputs) -> Features:
        with profile.encoding(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            return called(*inputs)

    def loss_of(features: Features, valid: torch.Tensor) -> torch.Tensor:
        return contrastive_loss(features, valid, kind=config.loss, tiled=config.tiled, group=world.group)

    def save() -> None:
        known_bad = {sample: reason for each in world.each(dict(loader.known_bad)) for sample, reason in each.items()}
        state = {
            "samples_seen": samples_seen,
            "skipped_steps": skipped,
            "index_digest": index.digest,
            "source_shards": index.source_shards,
            "known_bad": {str(sample): known_bad[sample] for sample in sorted(known_bad)},
        }
        averages = {} if ema is None else {"ema": ema.tensors}
        writer.save(step, model.state_dict(), optim.state_tensors(model, optimizer), state, **averages)

    rates = Rates(config, encoders, device, world)
    profile = Profile(config, model, rates, world, step)
    skips, advice, budget = Skips(device, skipped), Advice(), BadSampleBudget(config.max_bad_fraction)
    losses: list[torch.Tensor] = []
    first_step, rate_at = step + 1, schedule_of(config)
    writer = CheckpointWriter(
        run, keep=config.keep_checkpoints, milestone_every=config.milestone_every, rank=world.rank,
        world_size=world.size, nonce=world.of_first(secrets.token_hex(4)),
    )  # fmt: skip
    with stop:
        with writer, contextlib.closing(batches), log or contextlib.nullcontext(), profile:
            stopping = False
            while step < config.total_steps and not stopping:
                peers.at(step + 1, "waiting for data")
                profile.begin(step + 1)
                with rates.waiting():
                    batch = next(batches)
                profile.end("data_wait")
                batch = batch.to(device)
                profile.end("copy")
                inputs = (batch.patches, batch.positions, batch.caption_ids)

                peers.at(step + 1, "computing", patient=step + 1 == first_step)
                rate = rate_at(samples_seen)
                optim.set_learning_rate(optimizer, rate)
                if config.accumulate == 1:
                    features = encode(inputs)
                    loss = loss_of(features, batch.valid)
                    profile.end("loss")
                    backward(loss, model, world)
                    profile.end("backward")
                else:
                    features, loss = accumulated(
                        encode, functools.partial(loss_of, valid=batch.valid), inputs, config.accumulate,
                        called=called, model=model, world=world, mark=profile.end,
                    )  # fmt: skip
                gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
                loss, norm = over_ranks(loss, gradients, world)
                if config.grad_clip:
                    optim.clip_gradients(gradients, norm, config.grad_clip)
                left_out = skips.judge(loss, norm)
                profile.end("gradient_reduction")
                optim.step_unless(optimizer, left_out)
                optimizer.zero_grad(set_to_none=True)
                del gradients  # or they would lie beside the next step's
                model.clamp_logit_scale()
                if ema is not None:
                    ema.update(left_out)
                profile.end("optimizer")

                step += 1
                samples_seen += config.batch_size
                losses.append(loss)
                peers.at(step, "meeting the others")
                ids = world.rows(batch.sample_ids.numpy())
                num_asked, num_rejected = world.totals(stop.asked, len(batch.rejected))
                stopping = num_asked > 0
                rejected = tuple(itertools.chain(*world.each(batch.rejected))) if num_rejected else ()
                if log is not None:
                    log.step(step, ids, rejected)
                    budget.add(len(ids), rejected)

                ending = stopping or step == config.total_steps
                evaluating = config.eval_every > 0 and (step % config.eval_every == 0 or step == config.total_steps)
                saving = ending or step % config.checkpoint_every == 0
                logging = evaluating or saving or step % config.log_every == 0
                # What is read from the device waits for it, so it is seldom done on a GPU.
                if logging or device.type == "cpu" or step % NON_FINITE_LIMIT == 0:
                    skipped, in_a_row = skips.read()
                    if in_a_row >= NON_FINITE_LIMIT:
                        raise AgreedError(non_finite_run(step, run, loader, ids) if world.is_first else "")
                profile.end("logging")
                if logging:
                    recent = torch.stack(losses).tolist()
                    values: dict[str, Any] = {
                        "step": step,
                        "samples_seen": samples_seen,
                        "loss": sum(recent) / len(recent),
                        "lr": rate,
                        "logit_scale": float(features.logit_scale.detach()),
                        "grad_norm": float(norm),
                        **rates.since_last(len(recent)),
                        "skipped_steps": skipped,
                        "rejected": 0 if log is None else log.num_rejected,
                        "checkpoint_wait_fraction": writer.waited_s / rates.run_s,
                    }
                    if measure is not None and evaluating:
                        peers.at(step, "evaluating", patient=True)
                        values |= measure(model)
                        profile.end("evaluation")
                    if log is not None:
                        log.metrics(values)
                        advice.losses(step, recent)
                        advice.data_wait(step, values["data_wait_fraction"])
                    print(log_line(values, config.total_steps), flush=True)
                    losses = []
                    profile.end("logging")
                    # Where steps go wrong one after the other, good checkpoints are not to be pushed out.
                    if saving and (ending or not in_a_row):
                        peers.at(step, "saving", patient=True)
                        save()
                    profile.end("checkpoint")
                    rates.restart()
                writer.check()
        peers.at(step, "saving", patient=True)
        world.totals(0)  # all leave together: torchrun ends the others when one does
    if step < config.total_steps:
        print(f"interrupted at step {step:,}; the same command goes on from {checkpoint.name_of_newest(run)}")
        return INTERRUPTED
    print(f"finished: {step:,} steps, {samples_seen:,} pairs; {checkpoint.name_of_newest(run)}")
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())
