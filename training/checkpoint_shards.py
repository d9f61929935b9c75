"""Tensors in boxes: what of each tensor a rank holds goes into that rank's file, and any box of it comes out again.

A box is an offset into the whole tensor and a local tensor, made from a plain tensor or a DTensor. Files and layout
know nothing of processes: what 8 ranks wrote, one process reads, and 3 ranks, each reading only its own slices.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """The box of a tensor that this rank holds."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offset: tuple[int, ...]
    """Where the box begins in it, one number a dimension."""
    local: torch.Tensor


@dataclass(frozen=True)
class Held:
    """What one rank writes of a group of named tensors, and whether the group lies in pieces over ranks."""

    pieces: dict[str, Piece]
    sharded: bool


def held(tensors: Mapping[str, torch.Tensor | Piece], rank: int) -> Held:
    """Returns the boxes that this rank is to write: each box of each tensor is written by exactly one rank.

    Copies are written by the first rank that holds them: plain tensors by rank 0, a DTensor's replicas by those whose
    coordinate is 0 in the replicated dimensions of its mesh. Nothing is gathered. A `Piece` is taken as it is.
    """
    pieces: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        if isinstance(tensor, Piece):
            piece = tensor
        elif _is_dtensor(tensor):
            if not _first_replica(tensor):
                continue
            piece = Piece(tuple(tensor.shape), _box(tensor)[0], tensor.to_local().detach())
        elif rank == 0:
            piece = Piece(tuple(tensor.shape), (0,) * tensor.ndim, tensor.detach())
        else:
            continue
        # A rank beyond the end of a short dimension holds nothing; an empty tensor still has to be written once.
        if piece.local.numel() or (rank == 0 and 0 in piece.shape):
            pieces[name] = piece
    return Held(pieces, any(_is_sharded(tensor) for tensor in tensors.values()))


def _is_sharded(tensor: torch.Tensor | Piece) -> bool:
    """The same answer on every rank, since the names of files follow from it."""
    if isinstance(tensor, Piece):
        return True
    if _is_dtensor(tensor):
        sizes = zip(tensor.placements, tensor.device_mesh.shape, strict=True)
        return any(placement.is_shard() and size > 1 for placement, size in sizes)
    return False


def _is_dtensor(tensor: torch.Tensor) -> "TypeGuard[DTensor]":
    # There is none before its module was imported, which takes most of a second that validate.py need not spend.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _first_replica(tensor: "DTensor") -> bool:
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        return False
    for placement in tensor.placements:
        # A sum that is still due, or shards in turns, are no boxes.
        assert type(placement).__name__ in ("Shard", "Replicate"), placement
    return not any(
        place for place, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate()
    )


def _box(tensor: "DTensor") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns this rank's offset into a DTensor and its local shape."""
    # What torch's own checkpoints are made with; DTensor has no public method for it.
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(offset), tuple(shape)


def _opened(path: Path) -> Any:
    """Returns an open safetensors file. Raises ValueError, in one line, for what is none, whatever its checksum."""
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}); it was not opened: delete its checkpoint") from None


class StoredTensors:
    """Named tensors on disk, whole or in boxes. Reads what is asked for and no more."""

    def __init__(self, folder: Path, layout: Mapping[str, Mapping[str, Any]]) -> None:
        """layout: by name, the whole's `shape` and its `pieces`: [file name, offset]; the files know their sizes."""
        self._folder = folder
        self._layout = layout
        self._open: dict[str, Any] = {}

    @classmethod
    def single(cls, path: Path) -> "StoredTensors":
        """Returns the tensors of one safetensors file, each whole."""
        with _opened(path) as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        layout = {name: {"shape": shape, "pieces": [[path.name, [0] * len(shape)]]} for name, shape in shapes.items()}
        return cls(path.parent, layout)

    @property
    def names(self) -> list[str]:
        return list(self._layout)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._layout[name]["shape"])

    def whole(self, name: str) -> torch.Tensor:
        """Returns a whole tensor, put together on the CPU."""
        shape = self.shape(name)
        return self.read(name, (0,) * len(shape), shape)

    def read(self, name: str, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """Returns the box of a tensor at `offset`. Raises ValueError where the files do not hold all of it."""
        out: torch.Tensor | None = None
        found = 0
        for file_name, at in self._layout[name]["pieces"]:
            file = self._file(file_name)
            stored = file.get_slice(name)
            size = stored.get_shape()
            if list(size) == list(shape) and list(at) == list(offset):
                return file.get_tensor(name)
            low = [max(a, o) for a, o in zip(at, offset, strict=True)]
            high = [min(a + n, o + m) for a, n, o, m in zip(at, size, offset, shape, strict=True)]
            if any(h <= b for b, h in zip(low, high, strict=True)):
                continue
            part: torch.Tensor = stored[tuple(slice(b - a, h - a) for a, b, h in zip(at, low, high, strict=True))]
            if out is None:
                out = part.new_empty(tuple(shape))
            out[tuple(slice(b - o, h - o) for o, b, h in zip(offset, low, high, strict=True))] = part
            found += part.numel()
        if out is None and math.prod(shape) == 0:
            return self._one_number(name).new_empty(tuple(shape))
        if out is None or found != math.prod(shape):
            raise ValueError(f"{self._folder} holds {found} of {math.prod(shape)} numbers of {name}")
        return out

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns a tensor placed as `tensor` is: a DTensor of its mesh and device, or a plain one on the CPU.

        A DTensor reads this rank's slices only. What has another shape (a step counter) comes whole and plain.
        """
        if not _is_dtensor(tensor) or tuple(tensor.shape) != self.shape(name):
            return self.whole(name)
        from torch.distributed.tensor import DTensor

        offset, shape = _box(tensor)
        local = self.read(name, offset, shape).to(tensor.device, copy=True)
        return DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        )

    def _one_number(self, name: str) -> torch.Tensor:
        file_name, at = self._layout[name]["pieces"][0]
        return self._file(file_name).get_slice(name)[tuple(slice(0, 1) for _ in at)]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            if Path(name).name != name:
                raise ValueError(f"the layout of {self._folder} names a file elsewhere: {name}")
            self._open[name] = _opened(self._folder / name)
        return self._open[name]

    def __enter__(self) -> "StoredTensors":
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()
