"""The sigmoid loss of SigLIP: each image with each caption is one question, match or not. Dense, and in square tiles.

Source: arXiv 2303.15343. No row or column needs a sum over the others, so the tiled one finishes each tile at once,
gradient included: three products, as the dense one has, and memory that grows with C * E, not with R * C.

Shapes: E embedding, R rows (this rank's images), C columns (all ranks' captions), S and T rows and columns of a tile.
"""

from typing import Any

import torch
import torch.nn.functional as F

from .loss_tiled import tiles

# Above it softplus(x) is taken for x, which then is exact in float64 too.
_LINEAR = 40.0


def sigmoid_sum(
    scaled_RE: torch.Tensor,
    text_CE: torch.Tensor,
    bias: torch.Tensor,
    valid_R: torch.Tensor,
    valid_C: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """Returns the sum of -log sigmoid(z (scaled . text + bias)) over valid rows and columns, z 1 for a match, else -1.

    scaled: image features times the logit scale. first: the column that matches the first row; the others' follow it.
    Rows of pairs that are not valid must be zero.
    """
    logits_RC = scaled_RE @ text_CE.T + bias
    sign_RC = torch.full_like(logits_RC, -1)
    sign_RC.diagonal(offset=first).fill_(1)
    losses_RC = -F.logsigmoid(sign_RC * logits_RC)
    return torch.where(valid_R[:, None] & valid_C, losses_RC, 0).sum()


def tiled_sigmoid_sum(
    scaled_RE: torch.Tensor,
    text_CE: torch.Tensor,
    bias: torch.Tensor,
    valid_R: torch.Tensor,
    valid_C: torch.Tensor,
    first: int,
) -> torch.Tensor:
    """Returns what `sigmoid_sum` returns, with the same gradients, for the same arguments."""
    total: Any = _TiledSigmoid.apply(scaled_RE, text_CE, bias, valid_R, valid_C, first, torch.is_grad_enabled())
    return total


class _TiledSigmoid(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        scaled_RE: torch.Tensor,
        text_CE: torch.Tensor,
        bias: torch.Tensor,
        valid_R: torch.Tensor,
        valid_C: torch.Tensor,
        first: int,
        differentiate: bool,
    ) -> torch.Tensor:
        lowest = torch.finfo(scaled_RE.dtype).min
        total, bias_grad = torch.zeros_like(bias), torch.zeros_like(bias)
        scaled_grad_RE, text_grad_CE = torch.zeros_like(scaled_RE), torch.zeros_like(text_CE)
        for rows, columns in tiles(len(scaled_RE), len(text_CE)):
            logits_ST = torch.addmm(bias, scaled_RE[rows], text_CE[columns].T)
            matches = logits_ST.diagonal(offset=first + rows.start - columns.start)
            matches.neg_()
            # -log sigmoid(-x) is softplus(x), and its derivative sigmoid(x): both 0 here.
            logits_ST.masked_fill_(~(valid_R[rows, None] & valid_C[columns]), lowest)
            total += F.softplus(logits_ST, threshold=_LINEAR).sum()
            if differentiate:
                grad_ST = logits_ST.sigmoid_()
                matches.neg_()
                bias_grad += grad_ST.sum()
                scaled_grad_RE[rows].addmm_(grad_ST, text_CE[columns])
                text_grad_CE[columns].addmm_(grad_ST.T, scaled_RE[rows])
                del grad_ST
            del logits_ST, matches  # before the next tile is made
        ctx.save_for_backward(scaled_grad_RE, text_grad_CE, bias_grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        scaled_grad_RE, text_grad_CE, bias_grad = ctx.saved_tensors
        return scaled_grad_RE * grad, text_grad_CE * grad, bias_grad * grad, None, None, None, None
