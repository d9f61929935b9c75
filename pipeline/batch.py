"""The one thing that leaves the pipeline: a batch of short sequences, ready for the encoders."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Rejection:
    """A sample that could not be used, named so that a person can find it."""

    sample_id: int
    shard: str
    key: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """This rank's slots of one global batch; always full, bad slots marked. Tensors are contiguous."""

    patches: torch.Tensor
    """uint8 [batch, tokens, patch*patch*3]: kept patches, each row, column, channel. Normalised on the device."""
    positions: torch.Tensor
    """int16 [batch, tokens]: row-major index of each kept patch on the grid."""
    grid: tuple[int, int]
    """(rows, columns) of the grid that positions index."""
    caption_ids: torch.Tensor
    """int32 [batch, text_tokens]."""
    valid: torch.Tensor
    """bool [batch]: False where this slot's sample was bad; the loss leaves its row and column out."""
    sample_ids: torch.Tensor
    """int64 [batch]: row of the index, for the ledger. Stays on the CPU."""
    rejected: tuple[Rejection, ...] = ()
    """The bad slots of this batch."""

    def to(self, device: torch.device) -> "Batch":
        """Returns the batch with what the encoders need on `device`.

        To a GPU by way of page-locked memory, so that the copy can overlap with the step; what was decoded there stays.
        """
        if device.type == "cpu":
            return self
        names = ("patches", "positions", "caption_ids", "valid")
        tensors: dict[str, torch.Tensor] = {name: getattr(self, name) for name in names}
        pinned = {name: each if each.is_cuda else each.pin_memory() for name, each in tensors.items()}
        return replace(self, **{name: each.to(device, non_blocking=True) for name, each in pinned.items()})
