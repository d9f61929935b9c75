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
        """Returns the batch with what the encoders need on `device`; a copy from pinned memory does not block."""
        if device.type == "cpu":
            return self
        names = ("patches", "positions", "caption_ids", "valid")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def pin_memory(self) -> "Batch":
        """Returns the batch in page-locked memory, so that `to` can overlap with the step."""
        names = ("patches", "positions", "caption_ids", "valid")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in names})
