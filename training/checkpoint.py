"""A run's state in, a folder of safetensors and JSON out, whole or not at all; and the newest whole one back.

`checkpoints/step-XXXXXXXX/` holds model.safetensors, optimizer.safetensors, state.json and manifest.json with a sha256
of each. It is written under another name, flushed, then renamed. Nothing is ever pickled.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

FOLDER = "checkpoints"
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]
    """step, samples_seen and what else `save` was given."""

    def model_tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "model.safetensors")

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / "optimizer.safetensors")


def save(
    run: Path,
    step: int,
    model: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Writes the checkpoint of `step` and deletes all but the newest `keep`. Returns its folder.

    Raises OSError (a full disk) with the older ones untouched.
    """
    folder = run / FOLDER
    final = folder / f"step-{step:08d}"
    partial = folder / (final.name + _PARTIAL)
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"*{_PARTIAL}"):
        shutil.rmtree(left_over)
    try:
        partial.mkdir()
        save_file({name: tensor.detach().contiguous() for name, tensor in model.items()}, partial / "model.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in optimizer.items()}, partial / "optimizer.safetensors")
        (partial / "state.json").write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
        manifest = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"{partial} cannot be written ({error}); the older checkpoints are untouched") from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    steps = list_steps(run)
    older = [path for path in steps if path.name <= final.name]
    # One that is newer than this step was passed over as damaged when the run was resumed.
    for path in (*older[:-keep], *steps[len(older) :]):
        shutil.rmtree(path)
    return final


def list_steps(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first, whole or not."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if path.name[5:].isdigit())


def name_of_newest(run: Path) -> str:
    """Returns a phrase that tells a person where the newest checkpoint is."""
    steps = list_steps(run)
    return f"checkpoint {steps[-1]}" if steps else "no checkpoint was written"


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest whole checkpoint, or None, and one phrase for each newer one that is damaged."""
    passed_over: list[str] = []
    for path in reversed(list_steps(run)):
        fault = _fault(path)
        if fault is None:
            return Checkpoint(path, json.loads((path / "state.json").read_text())), passed_over
        passed_over.append(f"{path}: {fault}")
    return None, passed_over


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json is missing or damaged"
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        try:
            if manifest.get(name) != _sha256(path / name):
                return f"{name} is damaged (its checksum differs)"
        except OSError:
            return f"{name} is missing"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
