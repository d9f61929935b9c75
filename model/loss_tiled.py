"""Symmetric InfoNCE without a matrix of logits: they come in square tiles, and again for the gradient.

Memory grows with C * E, not with R * C. One product serves both directions, on many ranks too: a rank knows a part of
each column's log-sum-exp, and the parts of its own columns come to it from the others, one number each.

Shapes: E embedding, R rows (this rank's images), C columns (all ranks' captions), S and T rows and columns of a tile.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from .gather import exchanged, gathered

TILE = 4096
"""Rows and columns of a tile: 64 MiB of logits."""


def tiled_cross_entropy_sum(
    scaled_RE: torch.Tensor,
    text_RE: torch.Tensor,
    valid_R: torch.Tensor,
    valid_C: torch.Tensor,
    group: dist.ProcessGroup | None,
) -> torch.Tensor:
    """Returns the sum over this rank's valid pairs of both cross-entropies.

    scaled: image features times the logit scale. Rows of pairs that are not valid must be zero.
    """
    lse: Any = _LogSumExp.apply(scaled_RE, gathered(text_RE, group), valid_R, valid_C)
    row_lse_R, column_lse_C = lse
    column_lse_R = exchanged(column_lse_C, group).logsumexp(dim=0)
    positive_R = (scaled_RE * text_RE).sum(dim=1)
    return torch.where(valid_R, row_lse_R + column_lse_R - 2 * positive_R, 0).sum()


class _LogSumExp(torch.autograd.Function):
    """The log-sum-exp of rows @ columns.T over each row and over each column, [R] and [C].

    What is not valid counts in neither; a sum over nothing is the lowest finite number.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows_RE: torch.Tensor, columns_CE: torch.Tensor, valid_R: torch.Tensor, valid_C: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        lowest = torch.finfo(rows_RE.dtype).min
        row_lse_R, column_lse_C = (rows_RE.new_full((len(x),), lowest) for x in (rows_RE, columns_CE))
        for rows, columns in tiles(len(rows_RE), len(columns_CE)):
            logits_ST = _logits(rows_RE, columns_CE, valid_R, valid_C, rows, columns)
            row_lse_R[rows] = torch.logaddexp(row_lse_R[rows], logits_ST.logsumexp(dim=1))
            column_lse_C[columns] = torch.logaddexp(column_lse_C[columns], logits_ST.logsumexp(dim=0))
            del logits_ST  # before the next tile is made
        ctx.save_for_backward(rows_RE, columns_CE, valid_R, valid_C, row_lse_R, column_lse_C)
        return row_lse_R, column_lse_C

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        rows_RE, columns_CE, valid_R, valid_C, row_lse_R, column_lse_C = ctx.saved_tensors
        row_grad_R, column_grad_C = grad_outputs
        rows_grad_RE, columns_grad_CE = torch.zeros_like(rows_RE), torch.zeros_like(columns_CE)
        for rows, columns in tiles(len(rows_RE), len(columns_CE)):
            logits_ST = _logits(rows_RE, columns_CE, valid_R, valid_C, rows, columns)
            grad_ST = (logits_ST - row_lse_R[rows, None]).exp_().mul_(row_grad_R[rows, None])
            grad_ST += logits_ST.sub_(column_lse_C[columns]).exp_().mul_(column_grad_C[columns])
            rows_grad_RE[rows].addmm_(grad_ST, columns_CE[columns])
            columns_grad_CE[columns].addmm_(grad_ST.T, rows_RE[rows])
            del logits_ST, grad_ST
        return rows_grad_RE, columns_grad_CE, None, None


def tiles(num_rows: int, num_columns: int) -> Iterator[tuple[slice, slice]]:
    """Gives the (rows, columns) of one tile after another; the last of either may be smaller than TILE."""
    for row in range(0, num_rows, TILE):
        for column in range(0, num_columns, TILE):
            yield slice(row, min(row + TILE, num_rows)), slice(column, min(column + TILE, num_columns))


def _logits(
    rows_RE: torch.Tensor,
    columns_CE: torch.Tensor,
    valid_R: torch.Tensor,
    valid_C: torch.Tensor,
    rows: slice,
    columns: slice,
) -> torch.Tensor:
    """Returns one tile of logits, [S, T]: the lowest finite number where a pair must not be seen."""
    logits_ST = rows_RE[rows] @ columns_CE[columns].T
    hidden_ST = ~(valid_R[rows, None] & valid_C[columns])
    return logits_ST.masked_fill_(hidden_ST, torch.finfo(logits_ST.dtype).min)
