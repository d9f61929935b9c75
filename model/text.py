"""The text tower: caption ids to one feature a caption. Attention runs both ways and padding takes part.

Shapes: B pairs, L text tokens, D width, E embedding, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .attention import Backend
from .blocks import block_stack
from .presets import ModelConfig, TextPooling

# The ids are there for poolings that look for an end token.
POOLINGS: dict[TextPooling, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "last": lambda x_BLD, caption_ids_BL: x_BLD[:, -1],
}


class TextTower(nn.Module):
    """A transformer over a fixed number of text tokens, with learned positions."""

    def __init__(self, config: ModelConfig, text_tokens: int, backend: Backend) -> None:
        super().__init__()
        tower = config.text
        self.token_embedding = nn.Embedding(tower.vocabulary, tower.width)
        self.positions_LD = nn.Parameter(torch.empty(text_tokens, tower.width))
        self.blocks = block_stack(tower, config.activation, config.norm_eps, backend)
        self.pool = POOLINGS[tower.pooling]
        self.final_norm = nn.LayerNorm(tower.width, eps=config.norm_eps)
        self.projection = nn.Linear(tower.width, config.embed_dim, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positions_LD, std=0.01)
        nn.init.normal_(self.projection.weight, std=tower.width**-0.5)

    def forward(self, caption_ids_BL: torch.Tensor) -> torch.Tensor:
        """Returns features [B, E], not yet normalised. caption_ids: int32."""
        if caption_ids_BL.shape[1] != len(self.positions_LD):
            raise ValueError(
                f"captions of {caption_ids_BL.shape[1]} tokens came to a text tower of {len(self.positions_LD)}; "
                "give both the same --text-tokens"
            )
        x_BLD = F.embedding(caption_ids_BL, self.token_embedding.weight) + self.positions_LD
        for block in self.blocks:
            x_BLD = block(x_BLD)
        # The dialect norms every position and then pools; a norm sees one position, so pooling first is the same.
        return self.projection(self.final_norm(self.pool(x_BLD, caption_ids_BL)))
