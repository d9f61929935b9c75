"""Symmetric InfoNCE over a batch in which some slots do not count. Features in, one scalar out, all in float32.

Costs two [B, B] products: each direction is rows against columns, so that later a rank can bring its own rows alone.

Shapes: B pairs, E embedding; R rows (the pairs to be scored), C columns (the candidates).
"""

import torch


def info_nce(
    image_features_BE: torch.Tensor,
    text_features_BE: torch.Tensor,
    logit_scale: torch.Tensor,
    valid_B: torch.Tensor,
    labels_B: torch.Tensor | None = None,
) -> torch.Tensor:
    """Returns the scalar mean over valid pairs of (image-to-text + text-to-image cross-entropy) / 2.

    It is what the dense loss gives on the valid pairs alone: a pair with valid False (bool [B]) is neither scored nor a
    negative of others, and its features get a gradient of exactly zero, whatever they hold. Without a valid pair the
    loss is 0, still connected to the graph. logit_scale: what cosines are multiplied by, exp of the parameter.

    labels (int64 [B]): pairs of one label carry the same caption, so to each other they are false negatives. They are
    then left out of each other's denominators: neither positive nor negative. A pair's own match always counts.
    """
    with torch.autocast(image_features_BE.device.type, enabled=False):
        # Cleared before the products: multiplying by zero later would let an inf or a NaN through.
        image_BE, text_BE = (cleared(x_BE, valid_B) for x_BE in (image_features_BE, text_features_BE))
        # On the smaller side of the product: B * E multiplications rather than B * B.
        scaled_BE = image_BE * logit_scale.to(image_BE.dtype)
        positives_B = torch.arange(len(valid_B), device=valid_B.device)
        hidden_BB = _hidden(positives_B, valid_B, labels_B, labels_B)
        to_text = _cross_entropy_sum(scaled_BE, text_BE, positives_B, hidden_BB, valid_B)
        to_image = _cross_entropy_sum(text_BE, scaled_BE, positives_B, hidden_BB, valid_B)
        num_valid = valid_B.sum().clamp(min=1)
        return (to_text + to_image) / (2 * num_valid)


def cleared(features_BE: torch.Tensor, valid_B: torch.Tensor) -> torch.Tensor:
    """Returns features in float32 (or their own, if that is more), with the rows of pairs that do not count at zero."""
    features_BE = features_BE.to(torch.promote_types(features_BE.dtype, torch.float32))
    return features_BE.masked_fill(~valid_B[:, None], 0)


def _hidden(
    positives_R: torch.Tensor,
    valid_C: torch.Tensor,
    labels_R: torch.Tensor | None,
    labels_C: torch.Tensor | None,
) -> torch.Tensor:
    """Returns bool [R, C], or one that broadcasts to it: True where a column stays out of a row's denominator."""
    hidden_RC = ~valid_C[None, :]
    if labels_R is not None and labels_C is not None:
        columns_C = torch.arange(len(valid_C), device=valid_C.device)
        copies_RC = (labels_R[:, None] == labels_C[None, :]) & (positives_R[:, None] != columns_C[None, :])
        hidden_RC = hidden_RC | copies_RC
    return hidden_RC


def _cross_entropy_sum(
    rows_RE: torch.Tensor,
    columns_CE: torch.Tensor,
    positives_R: torch.Tensor,
    hidden_RC: torch.Tensor,
    valid_R: torch.Tensor,
) -> torch.Tensor:
    """Returns the sum over valid rows of the cross-entropy of each against all columns that are not hidden.

    positives: int64 [R], the column that matches each row; on one rank of many it starts at that rank's offset.
    """
    logits_RC = rows_RE @ columns_CE.T
    # The lowest finite number rather than -inf: where every column is hidden, no inf - inf arises on the way to zero.
    logits_RC = logits_RC.masked_fill(hidden_RC, torch.finfo(logits_RC.dtype).min)
    positive_R = logits_RC.gather(1, positives_R[:, None])[:, 0]
    losses_R = logits_RC.logsumexp(dim=1) - positive_R
    return torch.where(valid_R, losses_R, 0).sum()
