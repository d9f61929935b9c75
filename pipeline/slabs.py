"""Slots for whole batches in memory that processes share: what one writes, another has as tensors, uncopied.

The memory has no name (memfd), so the kernel takes it back with the last process that maps it, however that ends.
A slot's tensors keep it: it is free again once the last of them is gone, and never before.
"""

import ctypes
import math
import mmap
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass

import torch

_ALIGNMENT = 64
"""Bytes; a cache line."""


@dataclass(frozen=True)
class Field:
    """One tensor of a slot."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Slab:
    """Slots of the same fields. Freeing is noticed when a slot is asked for, so any thread may drop its tensors."""

    def __init__(self, fields: Mapping[str, Field], num_slots: int, descriptor: int | None = None) -> None:
        """descriptor: of a slab of the same fields and slots that another process made; None makes one.

        Raises ValueError where the system has no memory without a name.
        """
        self.fields, self.num_slots = dict(fields), num_slots
        self._offsets: dict[str, int] = {}
        at = 0
        for name, field in self.fields.items():
            self._offsets[name] = at
            at += -(-field.num_bytes // _ALIGNMENT) * _ALIGNMENT
        self.slot_bytes = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
        self.descriptor = memory_file("shortclip batches") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, self.slot_bytes * num_slots)
        self._memory = mmap.mmap(self.descriptor, self.slot_bytes * num_slots)
        self._lent: dict[int, weakref.ref[ctypes.Array[ctypes.c_ubyte]]] = {}

    def tensors(self, slot: int) -> dict[str, torch.Tensor]:
        """Returns the fields of a slot, which stays lent as long as any of them, or a view of one, is there."""
        lease = (ctypes.c_ubyte * self.slot_bytes).from_buffer(self._memory, slot * self.slot_bytes)
        self._lent[slot] = weakref.ref(lease)
        return {
            name: torch.frombuffer(
                lease, dtype=field.dtype, count=math.prod(field.shape), offset=self._offsets[name]
            ).view(field.shape)
            for name, field in self.fields.items()
        }

    def lent(self) -> set[int]:
        """Returns the slots whose tensors are still in use."""
        self._lent = {slot: lease for slot, lease in self._lent.items() if lease() is not None}
        return set(self._lent)

    def close(self) -> None:
        """Closes the descriptor; tensors that are lent stay whole, and their memory goes with them."""
        os.close(self.descriptor)


def memory_file(name: str) -> int:
    """Returns the descriptor of an empty file in memory that no folder lists. Raises ValueError outside Linux."""
    if not hasattr(os, "memfd_create"):
        raise ValueError("worker processes need memory files, which only Linux has; use --workers 0")
    return os.memfd_create(name)
