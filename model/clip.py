"""CLIP: both towers, the temperature, and for the sigmoid loss a bias. Patches and caption ids in, unit features out.

Shapes: B pairs, N image tokens, L text tokens, P patch values, E embedding.
"""

import math

import torch
from torch import nn

from .attention import AttentionName, attention_name, choose
from .image import ImageTower
from .loss import Features
from .presets import ImageConfig, ModelConfig, TextConfig
from .text import TextTower

# Added to a feature's norm before the division, as in the published models.
_NORM_EPS = 1e-8

LOGIT_SCALE = 1 / 0.07
"""What cosines are multiplied by at first. Source: CLIP, arXiv 2103.00020."""
SIGMOID_LOGIT_SCALE, SIGMOID_LOGIT_BIAS = 10.0, -10.0
"""The same for the sigmoid loss, and what is added then: nearly all pairs are no match. Source: arXiv 2303.15343."""


class CLIP(nn.Module):
    """The encoders of one preset for one grid and one text length.

    Only `text_tokens` and a table of positions that is not computed shape a parameter. Initialisation draws from
    torch's global generator: seed it with torch.manual_seed first.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        grid: tuple[int, int],
        text_tokens: int,
        attention: str = "auto",
        logit_bias: float | None = None,
    ) -> None:
        """grid: (rows, columns) that positions index. attention: what --attention takes, or `math`, the reference.

        logit_bias: what the bias of the sigmoid loss begins with, SIGMOID_LOGIT_BIAS in its paper; the temperature
        then begins as there too. None: there is no bias, and no parameter for it.
        """
        super().__init__()
        if min(*grid, text_tokens) < 1:
            raise ValueError(f"grid {grid[0]}x{grid[1]} with {text_tokens} text tokens: each must be 1 or more")
        name = attention_name(attention)
        self.config = config
        self.grid = grid
        self.text_tokens = text_tokens
        self.image = ImageTower(config, grid, name)
        self.text = TextTower(config, text_tokens, name)
        scale = LOGIT_SCALE if logit_bias is None else SIGMOID_LOGIT_SCALE
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(float(logit_bias)))

    def encode_image(self, patches_BNP: torch.Tensor, positions_BN: torch.Tensor) -> torch.Tensor:
        """Returns L2-normalised float32 [B, E]; the order of an image's patches does not matter.

        patches: uint8 [B, N, patch*patch*3], inside one: row, column, channel. positions: int16 [B, N], row-major.
        """
        return _unit(self.image(patches_BNP, positions_BN))

    def encode_text(self, caption_ids_BL: torch.Tensor) -> torch.Tensor:
        """Returns L2-normalised float32 [B, E]. caption_ids: int32 [B, text_tokens]."""
        return _unit(self.text(caption_ids_BL))

    def forward(self, patches_BNP: torch.Tensor, positions_BN: torch.Tensor, caption_ids_BL: torch.Tensor) -> Features:
        """Returns the features of images and captions, exp(logit_scale) and the logit bias, if the model has one."""
        image_features_BE = self.encode_image(patches_BNP, positions_BN)
        text_features_BE = self.encode_text(caption_ids_BL)
        return Features(image_features_BE, text_features_BE, self.logit_scale.exp(), self.logit_bias)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Puts exp(logit_scale) back between 1 and the dialect's bound, if it has one; called after each step."""
        if self.config.max_logit_scale is not None:
            # Source: open_clip and CLIPA's torch code; the JAX code leaves it free.
            self.logit_scale.clamp_(0, math.log(self.config.max_logit_scale))

    def num_parameters(self) -> dict[str, int]:
        """Returns how many parameters each tower has: `image`, `text`, and `total` with temperature and bias."""
        count = {name: sum(p.numel() for p in tower.parameters()) for name, tower in self.named_children()}
        return {**count, "total": sum(p.numel() for p in self.parameters())}


def _unit(features_BE: torch.Tensor) -> torch.Tensor:
    features_BE = features_BE.to(torch.promote_types(features_BE.dtype, torch.float32))
    return features_BE / (torch.linalg.vector_norm(features_BE, dim=-1, keepdim=True) + _NORM_EPS)


def attention_choices(
    config: ModelConfig, attention: AttentionName, tokens: int, text_tokens: int, *, device: str, dtype: torch.dtype
) -> dict[str, str]:
    """Returns the backend that serves each tower, by its name. Raises ValueError where a named one cannot serve."""
    towers = {"image": (config.image, tokens + 1), "text": (config.text, text_tokens)}
    return {
        name: choose(attention, num_tokens, device=device, dtype=dtype, head_dim=tower.width // tower.heads)
        for name, (tower, num_tokens) in towers.items()
    }


def gflops_per_pair(config: ModelConfig, tokens: int, text_tokens: int) -> tuple[float, float]:
    """Returns (image_forward, text_forward): GFLOPs of one image and one caption, 2 a multiply-add.

    A tower of L layers, width d and MLP ratio r over n tokens costs L * ((8 + 4 r) n d^2 + 4 n^2 d): 8 n d^2 for the
    four projections, 4 r n d^2 for the MLP, 4 n^2 d for scores and mix. The image adds 2 * tokens * patch_values * d
    for the patches, either tower 2 * d * embed_dim for the projection. n is tokens + 1 (the class token) for an image.
    Norms, GELU and the loss are left out; a training step is three times this. Source: counted from the layers; it
    gives open_clip's published 167.5 GFLOPs of ViT-L-14-CLIPA at 224 px and 32 text tokens.
    """
    image, text = config.image, config.text
    patches = 2 * tokens * image.patch_values * image.width
    image_flops = _tower_flops(image, tokens + 1) + patches + 2 * image.width * config.embed_dim
    text_flops = _tower_flops(text, text_tokens) + 2 * text.width * config.embed_dim
    return image_flops / 1e9, text_flops / 1e9


def _tower_flops(tower: ImageConfig | TextConfig, num_tokens: int) -> float:
    d, r, n = tower.width, tower.mlp_width / tower.width, num_tokens
    return tower.layers * ((8 + 4 * r) * n * d**2 + 4 * n**2 * d)
