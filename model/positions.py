"""Where a patch stands on its grid: tables of one row a position, computed, or resampled from another grid's.

Going to another grid, CLIPA's JAX code computes the table anew from whole-number coordinates; its torch code resamples
the old one. Both are here, and the resampling of text positions.

Shapes: R grid rows, C grid columns, G = R * C positions, D width, F = D / 4 frequencies, L text tokens.
"""

import torch
import torch.nn.functional as F

from .presets import ImageConfig, SinCos


def sincos_2d(width: int, grid: tuple[int, int], formula: SinCos = "moco") -> torch.Tensor:
    """Returns float32 [rows * columns, width], row-major over the grid.

    A row holds sin(x w), cos(x w), sin(y w), cos(y w), with x the column and y the row, for F frequencies w:
    10000**(-i / (F - 1)) as MoCo v3 has them, or 10000**(-i / F) as MAE. The class token's row would be zeros.
    """
    num_frequencies = width // 4
    assert width % 4 == 0, width
    assert num_frequencies > 1, width
    steps = num_frequencies - 1 if formula == "moco" else num_frequencies
    frequencies_F = 10_000.0 ** -(torch.arange(num_frequencies, dtype=torch.float64) / steps)
    rows, columns = grid
    y_G = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    x_G = torch.arange(columns, dtype=torch.float64).repeat(rows)
    x_GF, y_GF = torch.outer(x_G, frequencies_F), torch.outer(y_G, frequencies_F)
    table_GD = torch.cat([x_GF.sin(), x_GF.cos(), y_GF.sin(), y_GF.cos()], dim=1)
    return table_GD.to(torch.float32)


def computed_positions(image: ImageConfig, grid: tuple[int, int]) -> torch.Tensor:
    """Returns the table that an image tower's config asks for, float32 [rows * columns, width]."""
    return sincos_2d(image.width, grid, image.sincos).mul_(image.position_scale)


def resized_grid(table_GD: torch.Tensor, old: tuple[int, int], new: tuple[int, int]) -> torch.Tensor:
    """Returns the table of grid `old` resampled to grid `new`: bicubic, antialiased, as CLIPA's torch code does."""
    if old == new:
        return table_GD
    image_1DRC = table_GD.T.reshape(1, -1, *old)
    resized = F.interpolate(image_1DRC, size=new, mode="bicubic", antialias=True, align_corners=False)
    return resized.flatten(2)[0].T.contiguous()


def resized_text(table_LD: torch.Tensor, text_tokens: int) -> torch.Tensor:
    """Returns text positions resampled to another length: linear, not antialiased, as CLIPA's torch code does."""
    if len(table_LD) == text_tokens:
        return table_LD
    resized = F.interpolate(table_LD.T[None], size=text_tokens, mode="linear", align_corners=False)
    return resized[0].T.contiguous()
