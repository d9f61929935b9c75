"""AdamW over a model's parameters, decaying what the dialect decays; its state as named tensors, for checkpoints."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from model.presets import Decayed


def build(
    model: nn.Module, *, weight_decay: float, beta2: float, eps: float = 1e-8, decayed: Decayed = "kernels"
) -> torch.optim.AdamW:
    """Returns fused AdamW, betas (0.9, beta2). The learning rate is set before each step.

    Decayed: the weight matrices of linear layers (`kernel` in CLIPA's JAX code); with `matrices`, as in its torch code,
    also embeddings and learned positions. Never biases, norms, the class token or the temperature.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decayed == "matrices":
        kernels = {id(parameter) for parameter in parameters if parameter.ndim >= 2}
    else:
        kernels = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    # A fused step takes tensors of one kind: with --shard the temperature is no DTensor, unlike the others.
    kinds = {True: weight_decay, False: 0.0}
    groups = [
        {"params": members, "weight_decay": decay}
        for is_kernel, decay in kinds.items()
        for is_sharded in (True, False)
        if (members := [p for p in parameters if (id(p) in kernels, isinstance(p, DTensor)) == (is_kernel, is_sharded)])
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, beta2), eps=eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def step_unless(optimizer: torch.optim.Optimizer, left_out: torch.Tensor) -> None:
    """Takes a step, or changes nothing where `left_out` (float32, on the parameters' device) is 1; asks the device
    nothing. This is how a gradient scaler tells a fused optimiser of an overflow."""
    optimizer.found_inf = left_out  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, largest: float) -> None:
    """Scales gradients, in place, down to a norm of `largest` together. norm: what it is."""
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
    torch._foreach_mul_(local, factor)  # pyright: ignore


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Returns the optimiser's tensors by `PARAMETER.KIND`, such as `image.patches.weight.exp_avg`."""
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        for kind, value in optimizer.state[parameter].items():
            tensors[f"{name}.{kind}"] = value
    return tensors


def load_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `state_tensors` gave. Raises ValueError where a parameter's state is missing."""
    for name, parameter in model.named_parameters():
        found = {kind: tensors.get(f"{name}.{kind}") for kind in ("step", "exp_avg", "exp_avg_sq")}
        if any(value is None for value in found.values()):
            raise ValueError(f"the optimiser's state lacks {name}; the checkpoint is of another model")
        # Fused AdamW keeps its step counter beside the parameter.
        optimizer.state[parameter] = {
            kind: value if isinstance(value, DTensor) else value.to(parameter.device, copy=True)
            for kind, value in found.items()
            if value is not None
        }
