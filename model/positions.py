"""Where a patch stands on its grid: a fixed table of 2-D sines and cosines, one row a position, never trained.

Another grid needs no interpolation: the table is computed anew, from whole-number coordinates.

Shapes: R grid rows, C grid columns, G = R * C positions, D width, F = D / 4 frequencies.
"""

import torch


def sincos_2d(width: int, grid: tuple[int, int]) -> torch.Tensor:
    """Returns float32 [rows * columns, width], row-major over the grid.

    As MoCo v3: F frequencies 10000**(-i / (F - 1)), and a row holds sin(x w), cos(x w), sin(y w), cos(y w), with x the
    column and y the row. The class token has no position: its row would be zeros.
    """
    num_frequencies = width // 4
    assert width % 4 == 0, width
    assert num_frequencies > 1, width
    exponents_F = torch.arange(num_frequencies, dtype=torch.float64) / (num_frequencies - 1)
    frequencies_F = 10_000.0**-exponents_F
    rows, columns = grid
    y_G = torch.arange(rows, dtype=torch.float64).repeat_interleave(columns)
    x_G = torch.arange(columns, dtype=torch.float64).repeat(rows)
    x_GF, y_GF = torch.outer(x_G, frequencies_F), torch.outer(y_G, frequencies_F)
    table_GD = torch.cat([x_GF.sin(), x_GF.cos(), y_GF.sin(), y_GF.cos()], dim=1)
    return table_GD.to(torch.float32)
