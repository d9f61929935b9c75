"""Checkpoints on disk: which there are, which is the newest whole one, and its tensors, whole or a rank's own slices.

`checkpoints/step-XXXXXXXX/` holds state.json, manifest.json with the size and sha256 of each file, and the tensors:
model.safetensors and optimizer.safetensors, or with `--shard` one `model-RRRRR-of-WWWWW.safetensors` a rank, and
layout.json that says where in the whole each piece lies. Nothing is ever pickled. checkpoint_writer.py writes them.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .checkpoint_shards import StoredTensors

FOLDER = "checkpoints"
PARTIAL = ".partial"
"""How the name of a folder ends that is being written, or deleted: never read."""
MANIFEST, STATE, LAYOUT = "manifest.json", "state.json", "layout.json"
_OF_RANK = re.compile(r"-(\d+)-of-\d+\.safetensors$")


@dataclass(frozen=True)
class Checkpoint:
    """One whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]
    """step, samples_seen and what else the writer was given."""

    def model_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors("model")

    def optimizer_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors("optimizer")

    def tensors(self, group: str) -> dict[str, torch.Tensor]:
        """Returns a group's tensors, each whole, on the CPU, however many ranks wrote them. {} where there is none."""
        stored = self.stored(group)
        return {name: stored.whole(name) for name in stored.names}

    def tensors_like(self, group: str, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Returns a group's tensors placed as those of `like` are, which has NAME, or PARAMETER for PARAMETER.KIND.

        Where that is a DTensor of the same shape, so is the result, and only this rank's slices are read, whatever the
        number of ranks that wrote. All else comes whole and plain, on the CPU.
        """
        stored = self.stored(group)
        found: dict[str, torch.Tensor] = {}
        for name in stored.names:
            placed = like.get(name, like.get(name.rpartition(".")[0]))
            found[name] = stored.whole(name) if placed is None else stored.like(name, placed)
        return found

    def stored(self, group: str) -> StoredTensors:
        """Returns the reader of a group of tensors, for single ones or boxes of them."""
        layout = self.path / LAYOUT
        groups = json.loads(layout.read_text(encoding="utf-8")) if layout.exists() else {}
        single = self.path / f"{group}.safetensors"
        if group not in groups and single.exists():
            return StoredTensors.single(single)
        return StoredTensors(self.path, groups.get(group, {}))


def at(path: Path) -> Checkpoint:
    """Returns the checkpoint in a folder without checking it: for ranks that rank 0 told which is whole."""
    return Checkpoint(path, json.loads((path / STATE).read_text(encoding="utf-8")))


def list_steps(run: Path) -> list[Path]:
    """Returns the checkpoint folders of a run, oldest first, whole or not."""
    found = [path for path in (run / FOLDER).glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    return int(path.name[5:])


def name_of_newest(run: Path) -> str:
    """Returns a phrase that tells a person where the newest checkpoint is."""
    steps = list_steps(run)
    return f"checkpoint {steps[-1]}" if steps else "no checkpoint was written"


def newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Returns the newest whole checkpoint, or None, and one phrase for each newer one that is damaged.

    Reads every byte of it, on several threads. Of many ranks, rank 0 alone does this and tells the others the folder
    (`at`): each byte is read once however many there are, and all of them go on from the same one.
    """
    passed_over: list[str] = []
    for path in reversed(list_steps(run)):
        fault = _fault(path)
        if fault is None:
            return at(path), passed_over
        passed_over.append(f"{path}: {fault}")
    return None, passed_over


def file_entry(path: Path) -> dict[str, Any]:
    """Returns what the manifest says of a file: its `bytes` and `sha256`."""
    with path.open("rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        expected = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    if any(Path(name).name != name for name in expected):
        return f"{MANIFEST} is damaged (it names files elsewhere)"
    for name in (STATE, *expected):
        part = _OF_RANK.search(name)
        what = f"{name}, of rank {int(part[1])}," if part else name
        try:
            size = (path / name).stat().st_size
        except OSError:
            return f"{what} is missing"
        if name not in expected:
            return f"{MANIFEST} is damaged (it lacks {name})"
        if size != expected[name][0]:
            return f"{what} is damaged ({size:,} of {expected[name][0]:,} bytes)"
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for name, found in zip(expected, threads.map(_sha256, [path / name for name in expected]), strict=True):
            if found != expected[name][1]:
                return f"{name} is damaged (its checksum differs)"
    return None


def _sha256(path: Path) -> str | None:
    try:
        return file_entry(path)["sha256"]
    except OSError:
        return None
