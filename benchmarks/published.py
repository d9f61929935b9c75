"""What CLIPA's authors published of their runs: stages, GPU-hours, accuracy. Data; nothing here was measured by us.

Sources: arXiv 2305.07017 (v2), tables 1 and 2, and the cost tables of its READMEs (hours of A100-80GB on a cloud;
those of L/14, H/14 and G/14 are its authors' estimates, since they trained on TPUs). Fine-tuning with masks counts the
patches that are kept: 70 % of 256 at 224 px (60 % for G/14), 60 % of 576 at 336 px.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """A part of a run with one sequence length. Image tokens are kept patches; the class token is not counted."""

    tokens: int
    text_tokens: int
    samples: float
    """Image-text pairs."""
    image_size: int
    """Side of the decoded square, in pixels."""


@dataclass(frozen=True)
class Run:
    """A published run."""

    name: str
    model: str
    """Name of the preset here."""
    stages: tuple[Stage, ...]
    a100_hours: float
    imagenet_top1: float
    """Percent, zero-shot."""
    estimated: bool = False
    """The hours are an estimate of the authors for GPUs on which they did not train."""


_FT_B = Stage(196, 16, 131.072e6, 224)
_PRE_84 = Stage(36, 8, 12.8e9, 84)
_FT_224 = Stage(179, 32, 512e6, 224)
_FT_336 = Stage(345, 32, 128e6, 336)

RUNS = (
    Run("B/16, 49 tokens, T 16", "ViT-B-16-bpe", (Stage(49, 16, 2.56e9, 112), _FT_B), 444, 63.2),
    Run("L/16, 16 tokens, T 16", "ViT-L-16-bpe", (Stage(16, 16, 2.56e9, 64), _FT_B), 628, 67.8),
    Run("L/16, 36 tokens, T 8", "ViT-L-16-bpe", (Stage(36, 8, 2.56e9, 96), Stage(196, 32, 131.072e6, 224)), 826, 69.3),
    Run("L/14, 84 px", "ViT-L-14", (_PRE_84, _FT_224), 4008, 79.7, estimated=True),
    Run("L/14, 84 px, then 336", "ViT-L-14", (_PRE_84, _FT_224, _FT_336), 4520, 80.3, estimated=True),
    Run("H/14, 70 px", "ViT-H-14", (Stage(25, 8, 12.8e9, 70), _FT_224), 5920, 81.1, estimated=True),
    Run("H/14, 84 px", "ViT-H-14", (_PRE_84, _FT_224), 7776, 81.5, estimated=True),
    Run("H/14, 84 px, then 336", "ViT-H-14", (_PRE_84, _FT_224, _FT_336), 8640, 81.8, estimated=True),
    Run("bigG/14, 84 px", "ViT-bigG-14", (_PRE_84, Stage(153, 32, 512e6, 224)), 21_998, 82.7, estimated=True),
    Run(
        "bigG/14, 84 px, then 336",
        "ViT-bigG-14",
        (_PRE_84, Stage(153, 32, 512e6, 224), _FT_336),
        23_742,
        83.0,
        estimated=True,
    ),
)
