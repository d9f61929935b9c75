"""Whether a run folder's run may go on, and from where: its recorded config beside this one, its newest checkpoint."""

import contextlib
import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.files import LOCK, only_writer
from pipeline.mixture import split_weights

from . import checkpoint
from .fields import Config, flag
from .health import NON_FINITE
from .metrics import LEDGER, METRICS, REJECTED
from .profile import PROFILE, TRACE

JOB = "job"
"""In config.json: which call of torchrun wrote it."""
MAY_DIFFER = frozenset(
    {"data", "out", "preset", "stage", "resume", "steps", "samples", "base_lr", "vocabulary"}
    | {"threads", "workers", "prefetch", "decoder", "device"}
    | {"log_every", "checkpoint_every", "keep_checkpoints", "milestone_every", "ledger", "eval_data", "eval_every"}
    | {"max_bad_fraction", "report_to", "profile", "peer_timeout"}
    | {"shard", "accumulate", "grad_checkpointing", "tiled_loss"}
)
"""What may be another when a run is resumed: the run's length, what it reports, and how its work is laid out over
threads, devices, ranks and memory. The data itself is held to the index's digest, not to its path; its weights may not
differ."""


@contextlib.contextmanager
def held_folder(run: Path) -> Generator[None]:
    """Holds a run's folder for this process. If it was made for that and nothing was written to it, as where a run is
    refused before its first step, it goes again, and so do the folders over it that were made too.

    Raises ValueError when another process holds it.
    """
    made = [folder for folder in (run, *run.parents) if not folder.exists()]
    with only_writer(run):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):  # another run began in one of them
                if made and os.listdir(run) == [LOCK]:
                    (run / LOCK).unlink()
                    for folder in made:
                        folder.rmdir()


def record(config: Config) -> dict[str, Any]:
    """Returns every value of a config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def refuse_other_run(old: Mapping[str, Any], config: Config, run: Path) -> None:
    """Raises ValueError, naming the flags, where a run folder was made with values that resuming may not change."""
    new = record(config)
    # A field that an older version did not know was at its default then.
    old = {**record(Config()), **old}
    old, new = _side_by_side(old), _side_by_side(new)
    # Of --data only the weights are part of the order; where the shards lie is not.
    old_shares, new_shares = split_weights(old.get("data", ()))[1], config.sources[1]
    phrases = [
        f"{flag(name)} is {json.dumps(old.get(name))} there and {json.dumps(new[name])} here"
        for name in new
        if name not in MAY_DIFFER and old.get(name) != new[name]
    ]
    if old_shares != new_shares:
        phrases.append(f"--data has {_weights(old_shares)} there and {_weights(new_shares)} here")
    if phrases:
        raise ValueError(f"{run} holds another run: {'; '.join(phrases)}; use another --out, or --resume never")


def left_open(config: Config, *, restarted: bool) -> dict[str, Any]:
    """Returns what a run that has a checkpoint says of values that the command line leaves open: its length, and the
    warm-up that followed from it; {} for a new run.

    restarted: torchrun started these processes again, so a run that they began before is resumed in any case.
    """
    old = _recorded(config.run_folder) or {}
    kept: dict[str, Any] = {}
    if restarted and old.get(JOB) == job():
        kept["resume"] = "auto"
    if not checkpoint.list_steps(config.run_folder) or (config.resume == "never" and not kept):
        return kept
    if config.steps is None and config.samples is None and "steps" in old:
        kept["steps"] = old["steps"]
    if config.warmup_samples is None and "warmup_samples" in old:
        kept["warmup_samples"] = old["warmup_samples"]
    return kept


def job() -> str | None:
    """Returns torchrun's name for what it runs, the same over its restarts; None without it."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


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
    old = _recorded(run)
    if old is None:
        raise ValueError(f"{recorded} is damaged; use another --out, or --resume never")
    refuse_other_run(old, config, run)
    last, passed_over = checkpoint.newest(run)
    for phrase in passed_over:
        print(f"passed over a damaged checkpoint: {phrase}", file=sys.stderr)
    if last is None and passed_over:
        raise ValueError(f"{run}: every checkpoint is damaged; --resume never starts anew")
    return last


def nothing_left(config: Config, state: Mapping[str, Any]) -> str:
    """Returns the line on a run whose newest checkpoint, of this state, is at the asked length or beyond."""
    run, done, asked = config.run_folder, state["step"], config.total_steps
    unused = "; --profile has no step to time" if config.profile else ""
    if done == asked:
        return f"{run} is finished: {done:,} steps, {state['samples_seen']:,} pairs; nothing to do{unused}"
    return (
        f"{run} has done {done:,} steps, more than the {asked:,} that are asked for; nothing to do{unused}. "
        f"For a run of {asked:,} steps give another --out, or --resume never"
    )


def refuse_other_data(state: Mapping[str, Any], digest: str, source_shards: Sequence[int] | None, run: Path) -> None:
    """Raises ValueError where a checkpoint's state is of other shards. source_shards: None where no weights are given.

    With weights, where one source ends and the next begins is part of the order.
    """
    if state["index_digest"] != digest:
        raise ValueError(f"{run} was trained on other data: the shards changed since; use another --out")
    if source_shards is not None and state.get("source_shards") != list(source_shards):
        raise ValueError(f"{run} was trained on sources of other shards: some moved between them; use another --out")


def clear(run: Path) -> None:
    """Deletes what an older run left in the folder; only once all that can be refused has been checked."""
    if (run / checkpoint.FOLDER).exists():
        shutil.rmtree(run / checkpoint.FOLDER)
    for name in ("config.json", METRICS, REJECTED, LEDGER, NON_FINITE, PROFILE, TRACE):
        (run / name).unlink(missing_ok=True)


def _recorded(run: Path) -> dict[str, Any] | None:
    """Returns what config.json holds; None where it is missing or damaged."""
    try:
        old = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return old if isinstance(old, dict) else None


def _side_by_side(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns a run's values with the stage that it starts from by name alone: the folder of both may be moved."""
    init, out = values.get("init"), values.get("out")
    if values.get("stage") and init and out and Path(init).parent == Path(out).parent:
        return {**values, "init": Path(init).name}
    return values


def _weights(shares: Sequence[float] | None) -> str:
    return "the weights " + " ".join(f"{share:.9g}" for share in shares) if shares else "no weights"
