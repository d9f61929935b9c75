"""The loss of a whole batch whose activations do not fit: encoders run on one micro-batch at a time, twice.

First without a graph, for the features of all micro-batches. The loss of the whole batch gives their gradients, and
that of the temperature and the bias, once. Then each micro-batch is encoded again, from the same patches, and the
gradients of its features go back through it. Nothing in the encoders is drawn, so both passes give the same features,
and the gradients are those of the whole batch. Source: GradCache, arXiv 2101.06983.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from model.clip import CLIP
from model.loss import Features

from .distributed import World
from .parallel import backward, exchanging

Inputs = Sequence[torch.Tensor]
"""What the encoders take: patches, positions, caption_ids; each [batch, ...]."""


def accumulated(
    encode: Callable[[Inputs], Features],
    loss_of: Callable[[Features], torch.Tensor],
    inputs: Inputs,
    num_micro: int,
    *,
    called: nn.Module,
    model: CLIP,
    world: World,
    mark: Callable[[str], None] = lambda part: None,
) -> tuple[Features, torch.Tensor]:
    """Returns the batch's features and this rank's share of the loss, both without a graph; fills the gradients.

    num_micro must divide the batch. called: the module that `encode` calls: the model or what it was spread to.
    mark: told where `loss` and each part of `backward` end; what encodes is told by the model's own marks.
    """
    micro = list(zip(*(each.chunk(num_micro) for each in inputs), strict=True))
    with torch.no_grad():
        parts = [encode(each) for each in micro]
    sizes = [len(part.image_features_BE) for part in parts]
    image = torch.cat([part.image_features_BE for part in parts]).requires_grad_()
    text = torch.cat([part.text_features_BE for part in parts]).requires_grad_()
    scale = parts[0].logit_scale.detach().requires_grad_()
    bias = parts[0].logit_bias
    bias = None if bias is None else bias.detach().requires_grad_()
    features = Features(image, text, scale, bias)
    loss = loss_of(features)
    leaves = [each for each in features if each is not None]
    image_grad, text_grad, *scalar_grads = torch.autograd.grad(loss, leaves, materialize_grads=True)
    mark("loss")
    for number, each in enumerate(micro):
        last = number == num_micro - 1
        rows = slice(sum(sizes[:number]), sum(sizes[: number + 1]))
        with exchanging(called, last):
            again = encode(each)
            carried = (again.image_features_BE * image_grad[rows]).sum()
            carried = carried + (again.text_features_BE * text_grad[rows]).sum()
            if last:
                for scalar, grad in zip(again[2:], scalar_grads, strict=False):
                    if scalar is not None:
                        carried = carried + scalar * grad
            backward(carried, model, world, scalars=last)
        mark("backward")
    return features, loss.detach()
