"""Checkpoints in the background: a copy to host memory while the step waits, the rest on a thread.

On every rank alike:

    with CheckpointWriter(run, rank=rank, world_size=world_size, keep=2, nonce=nonce) as writer:
        for step in ...:
            writer.save(step, model.state_dict(), optim.state_tensors(model, optimizer), state)
    # Here the last one is on disk; writer.waited_s says how long the steps waited.

Ranks meet in the folder only, so the thread needs no collective, and with `--shard` all of them need one shared file
system: rank 0 makes `step-XXXXXXXX.NONCE-N.partial`, each writes its files and a part-manifest into it, and rank 0
waits for the parts, adds layout, state and manifest, and renames. Tensors that are not sharded (DDP) are written by
rank 0 alone.
"""

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.files import write_text

from .checkpoint import FOLDER, LAYOUT, MANIFEST, PARTIAL, STATE, file_entry, list_steps, step_of
from .checkpoint_shards import Held, Piece, held

Tensors = Mapping[str, torch.Tensor | Piece]
_FAILED = ".failed"
_POLL_S = 0.05
_AFTER_ERROR_S = 20.0
"""For which rank 0 still waits for the others' parts once its run has ended with an error: they may be gone."""


@dataclass(frozen=True)
class _Save:
    """What the thread writes: this rank's boxes as copies of their own, and the state as text."""

    step: int
    partial: Path
    final: Path
    groups: dict[str, Held]
    state: str
    copied: "tuple[torch.cuda.Event, torch.cuda.Event] | None"
    """Around the copies on the device's stream, which are still to come when `save` returns."""


class CheckpointWriter:
    """Writes a run's checkpoints one at a time, each whole or not at all, and deletes the older ones.

    Policy where one cannot be written (full disk, a rank that is gone): the next call raises OSError, in one line, with
    the older checkpoints untouched and nothing left over, and training is to stop with it.
    """

    waited_s: float
    """Seconds that steps have waited so far: the caller in `save` and `close`, and the device for its copies."""

    def __init__(
        self,
        run: Path,
        *,
        keep: int,
        milestone_every: int = 0,
        rank: int = 0,
        world_size: int = 1,
        nonce: str = "",
        patience_s: float = 600.0,
    ) -> None:
        """keep: how many of the newest stay; steps that are multiples of `milestone_every` stay too (0: none).

        nonce: of this start of the run, the same on all ranks (rank 0's secrets.token_hex(4), broadcast); only one
        process alone may leave it out. patience_s: for which rank 0 waits for the parts of the others, and they for it
        to begin.
        """
        assert nonce or world_size == 1, "ranks need one nonce, or what a killed run left could pass for a part"
        self._folder = run / FOLDER
        self._run = run
        self._keep, self._milestone_every = keep, milestone_every
        self._rank, self._world_size = rank, world_size
        self._nonce = nonce or secrets.token_hex(4)
        self._patience_s = patience_s
        self._num_saves = 0
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._copied: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        self._error: Exception | None = None
        self._given_up_at: float | None = None
        self.waited_s = 0.0

    def save(self, step: int, model: Tensors, optimizer: Tensors, state: Mapping[str, Any], **more: Tensors) -> None:
        """Copies the tensors and returns; they may change from then on. Waits for the save before it.

        All ranks call it, at the same steps. `state` goes into state.json with `step`, rank 0's only. `more` are other
        groups of tensors by name: `ema=...` is written to ema.safetensors and read by `Checkpoint.tensors("ema")`.
        Raises OSError, in one line, if an earlier save failed.
        """
        start = time.perf_counter()
        try:
            self._join()
            self._num_saves += 1
            groups = {
                name: held(tensors, self._rank)
                for name, tensors in {"model": model, "optimizer": optimizer, **more}.items()
            }
            if self._rank and not any(group.sharded for group in groups.values()):
                return
            final = self._folder / f"step-{step:08d}"
            partial = final.with_name(f"{final.name}.{self._nonce}-{self._num_saves}{PARTIAL}")
            text = json.dumps({"step": step, **state}, indent=1) + "\n"
            copies, self._copied = self._copy(groups)
            save = _Save(step, partial, final, copies, text, self._copied)
            # A daemon: a process that must end, ends, and what it was writing is never read.
            self._thread = threading.Thread(target=self._work, args=(save,), name="checkpoint", daemon=True)
            self._thread.start()
        finally:
            self.waited_s += time.perf_counter() - start

    def check(self) -> None:
        """Raises what the thread has met, without waiting for it; cheap enough for every step."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits until the last save is whole on disk (on rank 0; elsewhere: this rank's part of it).

        Raises OSError, in one line, if it failed.
        """
        start = time.perf_counter()
        try:
            self._join()
        finally:
            self.waited_s += time.perf_counter() - start

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes. With an error under way it raises none of its own, and waits for other ranks a few seconds only."""
        if kind is None:
            self.close()
            return
        self._given_up_at = time.monotonic() + _AFTER_ERROR_S
        with contextlib.suppress(Exception):
            self.close()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            if self._copied is not None and self._error is None:
                self.waited_s += self._copied[0].elapsed_time(self._copied[1]) / 1e3
        self.check()

    def _copy(
        self, groups: Mapping[str, Held]
    ) -> "tuple[dict[str, Held], tuple[torch.cuda.Event, torch.cuda.Event] | None]":
        """Returns the boxes copied into this writer's host memory, which each save uses again; pinned for a GPU."""
        on_gpu = any(piece.local.is_cuda for group in groups.values() for piece in group.pieces.values())
        events = None
        if on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        copies: dict[str, Held] = {}
        for group_name, group in groups.items():
            pieces: dict[str, Piece] = {}
            for name, piece in group.pieces.items():
                local, buffer = piece.local, self._buffers.get((group_name, name))
                if buffer is None or buffer.shape != local.shape or buffer.dtype != local.dtype:
                    buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
                    self._buffers[group_name, name] = buffer
                # On a GPU the copy stands in the stream before whatever changes the tensor next.
                buffer.copy_(local, non_blocking=local.is_cuda)
                pieces[name] = Piece(piece.shape, piece.offset, buffer)
            copies[group_name] = Held(pieces, group.sharded)
        if events is not None:
            events[1].record()
        return copies, events

    def _work(self, save: _Save) -> None:
        """The thread."""
        try:
            if save.copied is not None:
                save.copied[1].synchronize()
            self._write(save)
        except (OSError, SafetensorError) as error:  # SafetensorError: what safetensors makes of a full disk
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            if self._rank and not isinstance(error, TimeoutError) and not save.partial.exists():
                reason = "rank 0 gave it up"
            self._clean_up(save, reason)
            self._error = OSError(
                f"{save.final} cannot be written ({reason}); the older checkpoints are untouched: "
                "mend that and run the same command again"
            )
        except Exception as error:  # A bug: it must not pass for a save.
            self._clean_up(save, str(error))
            self._error = error

    def _write(self, save: _Save) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if self._rank == 0:
            for left_over in self._folder.glob(f"*{PARTIAL}"):
                shutil.rmtree(left_over, ignore_errors=True)
            save.partial.mkdir(exist_ok=True)
        else:
            self._await_folder(save)
        part = self._write_part(save)
        if self._rank:
            write_text(save.partial / _part_name(self._rank), json.dumps(part))
            return
        parts = [part]
        if any(group.sharded for group in save.groups.values()):
            parts += self._other_parts(save)
        _finish(save, parts)
        self._delete_older(save.final)

    def _await_folder(self, save: _Save) -> None:
        """Waits until rank 0 has begun. It alone makes the folder: made by another after it gave up, it would stay."""
        deadline = time.monotonic() + self._patience_s
        while not save.partial.is_dir():
            if time.monotonic() > self._end_of(deadline):
                raise TimeoutError(f"rank 0 of {self._world_size} did not begin it within {self._patience_s:g} s")
            time.sleep(_POLL_S)

    def _end_of(self, deadline: float) -> float:
        """Returns until when to wait for other ranks; sooner once the run has ended with an error."""
        return deadline if self._given_up_at is None else min(deadline, self._given_up_at)

    def _write_part(self, save: _Save) -> dict[str, Any]:
        """Writes this rank's files. Returns their sizes and checksums, and where their pieces lie in the whole."""
        files: dict[str, Any] = {}
        layout: dict[str, Any] = {}
        for group_name, group in save.groups.items():
            if not group.sharded and self._rank:
                continue
            suffix = f"-{self._rank:05d}-of-{self._world_size:05d}" if group.sharded else ""
            path = save.partial / f"{group_name}{suffix}.safetensors"
            if group.sharded:
                layout[group_name] = {
                    name: {"shape": piece.shape, "pieces": [[path.name, piece.offset]]}
                    for name, piece in group.pieces.items()
                }
            if group.pieces or not group.sharded:
                save_file({name: piece.local for name, piece in group.pieces.items()}, path)
                _flush(path)
                files[path.name] = file_entry(path)
        return {"files": files, "layout": layout}

    def _other_parts(self, save: _Save) -> list[dict[str, Any]]:
        """Returns what the other ranks say they have written. Raises OSError, naming the rank, where one is silent."""
        deadline = time.monotonic() + self._patience_s
        while True:
            names = {path.name for path in save.partial.iterdir()}
            for rank in range(1, self._world_size):
                if _part_name(rank) + _FAILED in names:
                    reason = (save.partial / (_part_name(rank) + _FAILED)).read_text(encoding="utf-8")
                    raise OSError(f"rank {rank} of {self._world_size}: {reason or 'its disk is full'}")
            missing = [rank for rank in range(1, self._world_size) if _part_name(rank) not in names]
            if not missing:
                break
            if time.monotonic() > self._end_of(deadline):
                ranks = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing[:8]))}"
                raise TimeoutError(
                    f"no part came from {ranks} of {self._world_size} within {self._patience_s:g} s; "
                    f"each rank must be alive and see {self._folder}"
                )
            time.sleep(_POLL_S)
        parts: list[dict[str, Any]] = []
        for rank in range(1, self._world_size):
            path = save.partial / _part_name(rank)
            parts.append(json.loads(path.read_text(encoding="utf-8")))
            path.unlink()
        return parts

    def _clean_up(self, save: _Save, reason: str) -> None:
        """Leaves nothing of a save that failed; a rank other than 0 tells rank 0, which then does the same."""
        if self._rank == 0:
            # Under another name first: a rank that is still writing can then add nothing to it.
            aside = save.partial.with_name(f"{save.final.name}.failed{PARTIAL}")
            with contextlib.suppress(OSError):
                save.partial.rename(aside)
            shutil.rmtree(aside, ignore_errors=True)
            return
        for path in save.partial.glob(f"*-{self._rank:05d}-of-*.safetensors"):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            (save.partial / (_part_name(self._rank) + _FAILED)).write_text(reason, encoding="utf-8")

    def _delete_older(self, final: Path) -> None:
        steps = list_steps(self._run)
        older = [path for path in steps if step_of(path) <= step_of(final)]
        for path in older[: -self._keep]:
            if not self._milestone_every or step_of(path) % self._milestone_every:
                _discard(path)
        # One that is newer than this step was passed over as damaged when the run was resumed.
        for path in steps[len(older) :]:
            _discard(path)


def _part_name(rank: int) -> str:
    return f"part-{rank:05d}.json"


def _finish(save: _Save, parts: list[dict[str, Any]]) -> None:
    """Makes a whole checkpoint of the parts of all ranks, under its own name."""
    files: dict[str, Any] = {}
    layout: dict[str, dict[str, Any]] = {}
    for part in parts:
        files |= part["files"]
        for group, tensors in part["layout"].items():
            whole = layout.setdefault(group, {})
            for name, found in tensors.items():
                whole.setdefault(name, {"shape": found["shape"], "pieces": []})["pieces"] += found["pieces"]
    texts = {STATE: save.state, **({LAYOUT: json.dumps(layout) + "\n"} if layout else {})}
    for name, text in texts.items():
        write_text(save.partial / name, text)
        files[name] = file_entry(save.partial / name)
    write_text(save.partial / MANIFEST, json.dumps(files, indent=1) + "\n")
    _flush(save.partial)
    if save.final.exists():
        _discard(save.final)
    save.partial.rename(save.final)
    _flush(save.final.parent)


def _discard(folder: Path) -> None:
    """Deletes a checkpoint; killed half-way, it leaves nothing that looks like a damaged one."""
    aside = folder.with_name(f"{folder.name}.old{PARTIAL}")
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
