"""The pre-norm transformer block both towers are stacked from, and the ways to initialise a stack.

Under autocast the residual stream and the norms stay in float32; the products run in the lower precision.

Shapes: B pairs, N tokens, D width.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from .attention import AttentionName, SelfAttention, Sequences, Token, token_at
from .presets import Activation, BlockInit, ImageConfig, TextConfig

ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "gelu": nn.GELU,
}


class Block(nn.Module):
    """x_BND to x_BND: attention, then a two-layer perceptron, each behind its norm and added to what came in."""

    def __init__(
        self,
        tower: ImageConfig | TextConfig,
        activation: Activation,
        norm_eps: float,
        attention: AttentionName,
        causal: bool,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(tower.width, eps=norm_eps)
        self.attention = SelfAttention(tower.width, tower.heads, attention, causal=causal)
        self.mlp_norm = nn.LayerNorm(tower.width, eps=norm_eps)
        self.mlp_in = nn.Linear(tower.width, tower.mlp_width)
        self.activation = ACTIVATIONS[activation]()
        self.mlp_out = nn.Linear(tower.mlp_width, tower.width)

    def forward(
        self, x_BND: torch.Tensor, sequences: Sequences | None = None, only: Token | None = None
    ) -> torch.Tensor:
        """x: [B, N, D]; or [T, D] with the sequences that are laid end to end in it.

        only: the one token of each sequence that is wanted, [B, D]; of the others keys and values alone are computed.
        """
        mixed = self.attention(self.attention_norm(x_BND), sequences, only)
        x_BND = (x_BND if only is None else token_at(x_BND, only)) + mixed
        return x_BND + self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x_BND))))


def run_blocks(blocks: Iterable[nn.Module], x_BND: torch.Tensor, only: Token | None) -> torch.Tensor:
    """Returns what the last block gives: [B, N, D], or [B, D] of the token `only`, the sole one it then computes.

    Where one token is pooled, this spares 5/6 of the last block's products: 7 % of a tower of 12 layers.
    """
    *before, last = blocks
    for block in before:
        x_BND = block(x_BND)
    return last(x_BND, only=only)


def block_stack(
    tower: ImageConfig | TextConfig,
    activation: Activation,
    norm_eps: float,
    attention: AttentionName,
    *,
    causal: bool = False,
) -> nn.ModuleList:
    """Returns the tower's blocks in order, initialised as `tower.block_init` says, from torch's global generator."""
    blocks = [Block(tower, activation, norm_eps, attention, causal) for _ in range(tower.layers)]
    for block in blocks:
        # torch's own initialisation of an attention layer has none either.
        for linear in (block.attention.qkv, block.attention.out):
            nn.init.zeros_(linear.bias)
        BLOCK_INITS[tower.block_init](block, tower)
    return nn.ModuleList(blocks)


def _xavier(block: Block, tower: ImageConfig | TextConfig) -> None:
    # Query, key and value are separate matrices to the initialiser, each with fan-out D, though they are stored as one.
    for weight in block.attention.qkv.weight.chunk(3):
        nn.init.xavier_uniform_(weight)
    for linear in (block.attention.out, block.mlp_in, block.mlp_out):
        nn.init.xavier_uniform_(linear.weight)
    _zero_mlp_biases(block)


def _scaled_normal(block: Block, tower: ImageConfig | TextConfig) -> None:
    _torch_scaled_normal(block, tower)
    _zero_mlp_biases(block)


def _torch_scaled_normal(block: Block, tower: ImageConfig | TextConfig) -> None:
    """As open_clip's text tower, which leaves the biases of the perceptron as torch made them: uniform."""
    std = tower.width**-0.5
    nn.init.normal_(block.attention.qkv.weight, std=std)
    nn.init.normal_(block.mlp_in.weight, std=std * 2**-0.5)
    # What is added to the residual stream shrinks with depth, so that the stream's variance does not grow with it.
    for linear in (block.attention.out, block.mlp_out):
        nn.init.normal_(linear.weight, std=std * (2 * tower.layers) ** -0.5)


def _torch(block: Block, tower: ImageConfig | TextConfig) -> None:
    """As torch initialises nn.MultiheadAttention: Xavier on query, key and value as one matrix, with fan-out 3 D.

    The other three matrices are linear layers, which are as torch made them.
    """
    nn.init.xavier_uniform_(block.attention.qkv.weight)


def _zero_mlp_biases(block: Block) -> None:
    for linear in (block.mlp_in, block.mlp_out):
        nn.init.zeros_(linear.bias)


BLOCK_INITS: dict[BlockInit, Callable[[Block, ImageConfig | TextConfig], None]] = {
    "xavier": _xavier,
    "scaled_normal": _scaled_normal,
    "torch": _torch,
    "torch_scaled_normal": _torch_scaled_normal,
}
