"""The text tower: caption ids to one feature a caption. Padding takes part, save where attention is causal.

Shapes: B pairs, L text tokens, D width, E embedding, V vocabulary; T the tokens of a batch up to each end token.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .attention import AttentionName, Sequences, Token, choose
from .blocks import block_stack, run_blocks
from .presets import ModelConfig, TextPooling


def end_positions(caption_ids_BL: torch.Tensor) -> torch.Tensor:
    """Returns int64 [B]: where the end token stands, which is the highest id there is."""
    return caption_ids_BL.argmax(dim=1)


# The token that is pooled, the sole one the last block gives.
POOLINGS: dict[TextPooling, Callable[[torch.Tensor], Token]] = {
    "last": lambda _caption_ids_BL: -1,
    "end": end_positions,
}


class TextTower(nn.Module):
    """A transformer over a fixed number of text tokens, with learned positions."""

    def __init__(self, config: ModelConfig, text_tokens: int, attention: AttentionName) -> None:
        super().__init__()
        tower = config.text
        self.attention: AttentionName = attention
        self.head_dim = tower.width // tower.heads
        # Nothing attends to what follows the end token, and nothing is pooled from there: it need not be computed.
        self.ignores_padding = tower.causal and tower.pooling == "end"
        self.token_embedding = nn.Embedding(tower.vocabulary, tower.width)
        self.positions_LD = nn.Parameter(torch.empty(text_tokens, tower.width))
        self.blocks = block_stack(tower, config.activation, config.norm_eps, attention, causal=tower.causal)
        self.pooled_token = POOLINGS[tower.pooling]
        self.final_norm = nn.LayerNorm(tower.width, eps=config.norm_eps)
        self.projection = nn.Linear(tower.width, config.embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=tower.embedding_std)
        nn.init.normal_(self.positions_LD, std=tower.embedding_std / 2)
        nn.init.normal_(self.projection.weight, std=tower.width**-0.5)

    def forward(self, caption_ids_BL: torch.Tensor) -> torch.Tensor:
        """Returns features [B, E], not yet normalised. caption_ids: int32."""
        if caption_ids_BL.shape[1] != len(self.positions_LD):
            raise ValueError(
                f"captions of {caption_ids_BL.shape[1]} tokens came to a text tower of {len(self.positions_LD)}; "
                "give both the same --text-tokens"
            )
        x_BLD = F.embedding(caption_ids_BL, self.token_embedding.weight) + self.positions_LD
        if self.ignores_padding and self._backend(x_BLD) == "flash":
            pooled_BD = self.pooled_without_padding(x_BLD, caption_ids_BL)
        else:
            pooled_BD = run_blocks(self.blocks, x_BLD, self.pooled_token(caption_ids_BL))
        # The dialects norm every position and then pool; a norm sees one position, so pooling first is the same.
        return self.projection(self.final_norm(pooled_BD))

    def pooled_without_padding(self, x_BLD: torch.Tensor, caption_ids_BL: torch.Tensor) -> torch.Tensor:
        """Returns what the blocks give at each end token, [B, D], without computing any token after it."""
        length = caption_ids_BL.shape[1]
        last_B = end_positions(caption_ids_BL)
        ends_B = (last_B + 1).cumsum(0)
        offsets = F.pad(ends_B, (1, 0)).to(torch.int32)
        kept_BL = torch.arange(length, device=last_B.device) <= last_B[:, None]
        x_TD = x_BLD[kept_BL]
        for block in self.blocks:
            x_TD = block(x_TD, Sequences(offsets, length))
        return x_TD[ends_B - 1]

    def _backend(self, x_BLD: torch.Tensor) -> str:
        device = x_BLD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BLD.dtype
        return choose(self.attention, x_BLD.shape[1], device=device, dtype=dtype, head_dim=self.head_dim)
