"""The image tower: kept patches as uint8 and where they stood, to one feature an image.

No normalised image is ever stored: mean and std are folded into the patch embedding's weights, once a step.

Shapes: B pairs, N image tokens, P patch values (row, column, channel), D width, E embedding, G grid positions.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from .attention import AttentionName
from .blocks import block_stack, run_blocks
from .positions import computed_positions
from .presets import ImagePooling, ModelConfig, PatchInit

# Of a unit normal cut at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978

# Middle of uint8. Pixels are centred before the product: in bfloat16 both they and the difference are exact, and
# without it each weight's gradient is the small difference of two large, separately rounded terms (2 to 8 times the
# error, measured at width 768).
_PIXEL_CENTRE = 128

CLASS_TOKEN = 0
"""Its place among an image's tokens."""
# Of what the last block gives; where the class token is pooled, it gives that alone.
POOLINGS: dict[ImagePooling, Callable[[torch.Tensor], torch.Tensor]] = {
    "class": lambda x_BD: x_BD,
    "patch_mean": lambda x_BND: x_BND[:, 1:].mean(dim=1),
    "token_mean": lambda x_BND: x_BND.mean(dim=1),
}


class PatchEmbedding(nn.Linear):
    """uint8 patches_BNP to x_BND. The weight is the canonical one, [D, P], and acts on normalised pixels; no bias."""

    patch_mean_P: torch.Tensor
    patch_std_P: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        values = config.image.patch_values
        self._init: PatchInit = config.image.patch_init
        super().__init__(values, config.image.width, bias=False)
        mean, std = torch.tensor(config.pixel_mean), torch.tensor(config.pixel_std)
        self.register_buffer("patch_mean_P", (255 * mean - _PIXEL_CENTRE).repeat(values // 3), persistent=False)
        self.register_buffer("patch_std_P", (255 * std).repeat(values // 3), persistent=False)

    def reset_parameters(self) -> None:
        """LeCun normal is flax's default of a convolution; torch's, of a convolution and a linear layer, is uniform."""
        if self._init == "torch":
            super().reset_parameters()
            return
        std = math.sqrt(1 / self.in_features) / _TRUNCATED_STD
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        device = input.device.type
        # By hand, as autocast leaves integers alone: uint8 goes straight to the precision of the product.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        pixels_BNP = input.to(dtype, copy=True).sub_(_PIXEL_CENTRE)
        folded_DP = (self.weight / self.patch_std_P).to(dtype)
        # From the rounded weights, so that what rounding did to the mean's share cancels.
        folded_D = -(folded_DP.to(self.weight.dtype) * self.patch_mean_P).sum(dim=1)
        return F.linear(pixels_BNP, folded_DP, folded_D.to(dtype))


class ImageTower(nn.Module):
    """A vision transformer whose position embeddings are gathered, so that any subset of a grid's patches can come."""

    position_table_GD: torch.Tensor

    def __init__(self, config: ModelConfig, grid: tuple[int, int], attention: AttentionName) -> None:
        super().__init__()
        tower = config.image
        self.patch_embedding = PatchEmbedding(config)
        self.class_token_D = nn.Parameter(torch.zeros(tower.width))
        if tower.class_init == "normal":
            nn.init.normal_(self.class_token_D, std=tower.width**-0.5)
        table_GD = computed_positions(tower, grid)
        if tower.positions == "learned":
            self.position_table_GD = nn.Parameter(table_GD)
        else:
            self.register_buffer("position_table_GD", table_GD, persistent=tower.positions == "stored")
        self.pre_norm = nn.LayerNorm(tower.width, eps=config.norm_eps) if tower.pre_norm else nn.Identity()
        self.blocks = block_stack(tower, config.activation, config.norm_eps, attention)
        self.pool = POOLINGS[tower.pooling]
        self.only = CLASS_TOKEN if tower.pooling == "class" else None
        self.final_norm = nn.LayerNorm(tower.width, eps=config.norm_eps)
        self.projection = nn.Linear(tower.width, config.embed_dim, bias=False)
        nn.init.normal_(self.projection.weight, std=tower.width**-0.5)

    def forward(self, patches_BNP: torch.Tensor, positions_BN: torch.Tensor) -> torch.Tensor:
        """Returns features [B, E], not yet normalised. patches: uint8; positions: int16, row-major on the grid."""
        return self.encode(self.embed(patches_BNP, positions_BN))

    def embed(self, patches_BNP: torch.Tensor, positions_BN: torch.Tensor) -> torch.Tensor:
        """Returns what enters the first block, [B, 1 + N, D]: the class token, then the patches."""
        position_BND = F.embedding(positions_BN.to(torch.int32), self.position_table_GD)
        patch_BND = self.patch_embedding(patches_BNP) + position_BND
        class_B1D = self.class_token_D.expand(len(patch_BND), 1, -1)
        return self.pre_norm(torch.cat([class_B1D, patch_BND], dim=1))

    def encode(self, x_BND: torch.Tensor) -> torch.Tensor:
        """Returns features [B, E], not yet normalised, of what `embed` gave."""
        return self.projection(self.final_norm(self.pool(run_blocks(self.blocks, x_BND, self.only))))
