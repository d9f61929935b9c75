"""A training step without one of what makes it fast, to see what that gives."""

import contextlib
from collections.abc import Callable, Generator
from typing import Any, Literal

import torch
import torch.nn.functional as F

from model.attention import SelfAttention, Sequences, Token, token_at
from model.blocks import Block
from model.image import PatchEmbedding
from training.heap import give_freed_memory_back, keep_freed_memory

from .step_model import Stepper

Switch = Literal["fused AdamW", "folding", "layout", "one pooled token", "kept memory"]
SWITCHES: tuple[Switch, ...] = ("fused AdamW", "folding", "layout", "one pooled token", "kept memory")
"""What a step can do without, one at a time, to see what it gives; --compile is one more."""


@contextlib.contextmanager
def without(stepper: Stepper, switch: Switch) -> Generator[None]:
    """Steps inside go without it; weights and optimiser state go on as they are."""
    with _SWITCHES[switch](stepper):
        yield


@contextlib.contextmanager
def _replaced(kind: type, name: str, value: Any) -> Generator[None]:
    own = getattr(kind, name)
    setattr(kind, name, value)
    try:
        yield
    finally:
        setattr(kind, name, own)


@contextlib.contextmanager
def _plain_adamw(stepper: Stepper) -> Generator[None]:
    """torch's default on a CPU, tensor by tensor and operation by operation; on a GPU, list by list."""
    groups = stepper.optimizer.param_groups
    for group in groups:
        group["fused"] = None
    # Only a fused step can be left out by a number on the device.
    del stepper.optimizer.found_inf  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        for group in groups:
            group["fused"] = True


def _normalised_first(self: PatchEmbedding, input: torch.Tensor) -> torch.Tensor:
    """Pixels are normalised in float32, then multiplied: mean and std are not folded into the weights."""
    mean_P = self.patch_mean_P + 128
    return F.linear((input.to(torch.float32) - mean_P) / self.patch_std_P, self.weight)


def _separate(
    self: SelfAttention, x_BND: torch.Tensor, sequences: Sequences | None = None, only: Token | None = None
) -> torch.Tensor:
    """Three products for query, key and value, each laid out head by head in memory, and the result laid back."""
    assert sequences is None
    query_BHNK, key_BHNK, value_BHNK = (
        F.linear(x_BND, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2).contiguous()
        for weight, bias in zip(self.qkv.weight.chunk(3), self.qkv.bias.chunk(3), strict=True)
    )
    mixed = F.scaled_dot_product_attention(query_BHNK, key_BHNK, value_BHNK, is_causal=self.causal)
    out_BND = self.out(mixed.transpose(1, 2).contiguous().flatten(-2))
    return out_BND if only is None else token_at(out_BND, only)


_forward = Block.forward


def _all_tokens(
    self: Block, x_BND: torch.Tensor, sequences: Sequences | None = None, only: Token | None = None
) -> torch.Tensor:
    """The last block computes every token, and one is pooled after."""
    x_BND = _forward(self, x_BND, sequences)
    return x_BND if only is None else token_at(x_BND, only)


@contextlib.contextmanager
def _freed_at_once(stepper: Stepper) -> Generator[None]:
    give_freed_memory_back()
    try:
        yield
    finally:
        keep_freed_memory()


def _replacing(kind: type, name: str, value: Any) -> Callable[[Stepper], contextlib.AbstractContextManager[None]]:
    def replaced(stepper: Stepper) -> contextlib.AbstractContextManager[None]:
        return _replaced(kind, name, value)

    return replaced


_SWITCHES: dict[Switch, Callable[[Stepper], contextlib.AbstractContextManager[None]]] = {
    "fused AdamW": _plain_adamw,
    "folding": _replacing(PatchEmbedding, "forward", _normalised_first),
    "layout": _replacing(SelfAttention, "forward", _separate),
    "one pooled token": _replacing(Block, "forward", _all_tokens),
    "kept memory": _freed_at_once,
}
