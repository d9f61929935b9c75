"""The contrastive losses over a batch in which some slots do not count. Features in, one scalar out, all in float32.

`infonce`, CLIP's softmax over rows and over columns, and `sigmoid`, SigLIP's yes or no for each pair; each dense, which
is the plain reference, and tiled, whose memory does not grow with the square of the batch. On many ranks each scores
its own rows against the columns of all. The dense InfoNCE is here, the others in modules of their own.

Shapes: B pairs of this rank, E embedding; R rows (the pairs to be scored: B), C columns (the candidates: all ranks').
"""

from typing import NamedTuple

import torch
import torch.distributed as dist

from .choices import LossKind
from .gather import gathered, rank_in
from .loss_sigmoid import sigmoid_sum, tiled_sigmoid_sum
from .loss_tiled import tiled_cross_entropy_sum


class Features(NamedTuple):
    """What the encoders give, and what their products are turned into logits with."""

    image_features_BE: torch.Tensor
    """Of unit length, as the text's."""
    text_features_BE: torch.Tensor
    logit_scale: torch.Tensor
    """What cosines are multiplied by: exp of the parameter."""
    logit_bias: torch.Tensor | None = None
    """What is added then; the sigmoid loss needs it, and InfoNCE is the same whatever it is."""


def contrastive_loss(
    features: Features,
    valid_B: torch.Tensor,
    *,
    kind: LossKind,
    tiled: bool = False,
    group: dist.ProcessGroup | None = None,
) -> torch.Tensor:
    """Returns this rank's share of the loss of the full batch: the sum over ranks is the loss, a scalar.

    The sum over ranks of a parameter's gradients is its gradient of that loss. Both divide by the number of valid pairs
    on all ranks. A pair with valid False (bool [B]) is neither scored nor a negative of others, and its features get a
    gradient of exactly zero, whatever they hold. Without a valid pair the loss is 0, still connected to the graph.

    infonce: the mean over pairs of (image-to-text + text-to-image cross-entropy) / 2.
    sigmoid: the sum over all images and captions of -log sigmoid(z (scale * cosine + bias)), z 1 for a match, else -1,
    over the number of pairs. Source: SigLIP, arXiv 2303.15343.

    group: the ranks among which the batch is split, as many slots on each; all must call, and go backward. Without one
    the batch is all there is. Raises ValueError for the sigmoid loss of a model without a logit bias.
    """
    image_BE, text_BE, logit_scale, logit_bias = features
    with torch.autocast(image_BE.device.type, enabled=False):
        # Cleared before the products: multiplying by zero later would let an inf or a NaN through.
        image_BE, text_BE = (_cleared(x_BE, valid_B) for x_BE in (image_BE, text_BE))
        # On the smaller side of the product: B * E multiplications rather than B * C.
        scaled_BE = image_BE * logit_scale.to(image_BE.dtype)
        valid_C, first = gathered(valid_B, group), rank_in(group) * len(valid_B)
        num_valid = valid_C.sum().clamp(min=1)
        if kind == "infonce":
            if tiled:
                return tiled_cross_entropy_sum(scaled_BE, text_BE, valid_B, valid_C, group) / (2 * num_valid)
            to_text = _cross_entropy_sum(scaled_BE, gathered(text_BE, group), valid_B, valid_C, first)
            to_image = _cross_entropy_sum(text_BE, gathered(scaled_BE, group), valid_B, valid_C, first)
            return (to_text + to_image) / (2 * num_valid)
        if logit_bias is None:
            raise ValueError("the sigmoid loss needs a model with a logit bias: CLIP(..., logit_bias=-10.0)")
        total = tiled_sigmoid_sum if tiled else sigmoid_sum
        bias, text_CE = logit_bias.to(image_BE.dtype), gathered(text_BE, group)
        return total(scaled_BE, text_CE, bias, valid_B, valid_C, first) / num_valid


def _cleared(features_BE: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """Returns features in float32 (or their own, if that is more), with the rows of pairs that do not count at zero."""
    features_BE = features_BE.to(torch.promote_types(features_BE.dtype, torch.float32))
    return features_BE.masked_fill(~valid_B[:, None], 0)


def _cross_entropy_sum(
    rows_RE: torch.Tensor, columns_CE: torch.Tensor, valid_R: torch.Tensor, valid_C: torch.Tensor, first: int
) -> torch.Tensor:
    """Returns the sum over valid rows of the cross-entropy of each against all valid columns.

    first: the column that matches the first row; the others' follow it.
    """
    logits_RC = rows_RE @ columns_CE.T
    # The lowest finite number rather than -inf: where every column is hidden, no inf - inf arises on the way to zero.
    logits_RC = logits_RC.masked_fill(~valid_C, torch.finfo(logits_RC.dtype).min)
    losses_R = logits_RC.logsumexp(dim=1) - logits_RC.diagonal(offset=first)
    return torch.where(valid_R, losses_R, 0).sum()
