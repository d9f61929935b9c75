"""A moving average of a model's weights, beside them."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

EMA = "ema"
"""Its group of tensors in a checkpoint."""


class Ema:
    """average = decay * average + (1 - decay) * weights, after each step that was taken. Begins as the weights are."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._weights = dict(model.named_parameters())
        self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}
        """By the parameter's name; a DTensor where the parameter is one."""

    @torch.no_grad()
    def update(self, skipped: torch.Tensor) -> None:
        """skipped: 1 where the step was left out and nothing is to be averaged, else 0; on the weights' device."""
        share = (1 - self._decay) * (1 - skipped)
        for name, average in self.tensors.items():
            _local(average).lerp_(_local(self._weights[name]), share.to(average.dtype))

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Puts back what a checkpoint holds."""
        for name, average in self.tensors.items():
            average.copy_(tensors[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
