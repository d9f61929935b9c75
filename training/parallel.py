"""A model over ranks: a copy on each (DDP), or its weights cut over them (FSDP2); and gradients that are sums.

The loss of a rank is its share of the full batch's, so gradients are to be added up over ranks, and both ways of torch
average: `backward` undoes that. Parameters keep their names, and checkpoints are the same either way.
"""

import contextlib
import functools
import inspect
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from model.clip import CLIP

from .distributed import World

if TYPE_CHECKING:  # the step's benchmark runs where the loader's libraries are missing
    from .fields import Config

# No buffer of the model changes. Releases of torch from 2.13 on warn of the name that those before know alone.
_NEW_NAME = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_SYNC_NO_BUFFERS: Any = {"forward_sync_buffers" if _NEW_NAME else "broadcast_buffers": False}


def spread(model: CLIP, config: "Config", world: World) -> nn.Module:
    """Returns what is to be called in place of the model, for its forward and backward passes over all ranks.

    With --shard the model's own parameters become DTensors: build the optimiser after it.
    """
    blocks = [*model.image.blocks, *model.text.blocks]
    if config.grad_checkpointing:
        for block in blocks:
            # In place of a wrapping module, which would change the parameters' names. The blocks draw nothing.
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
    if config.shard and world.size > 1:
        if config.compile:
            # One by one, since each gathers its weights first: a graph cannot reach over that.
            for block in blocks:
                block.compile()
        mesh = init_device_mesh(config.device, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # FSDP2 takes no scalars: `backward` adds up their gradients.
        fully_shard(model, mesh=mesh, ignored_params=set(_scalars(model)))
        for name in ("encode_image", "encode_text"):
            register_fsdp_forward_method(model, name)
        return model
    if world.size == 1:
        if config.compile:
            model.compile()
        return model
    replicas = DistributedDataParallel(
        model,
        device_ids=[torch.cuda.current_device()] if config.device == "cuda" else None,
        gradient_as_bucket_view=True,
        **_SYNC_NO_BUFFERS,
    )
    if config.device == "cpu":
        _settle(replicas, model, config)
    if config.compile:
        model.compile()
    return replicas


def layout(config: "Config", world: World) -> str:
    """Returns, for a person, the ranks and how the model lies on them."""
    if world.size == 1:
        return "1" + (", so --shard has nothing to cut" if config.shard else "")
    kind = "weights, gradients and optimiser state cut over them (FSDP2)" if config.shard else "a copy on each (DDP)"
    return f"{world.size}, {config.batch_size // world.size:,} pairs each; {kind}"


def backward(loss: torch.Tensor, model: CLIP, world: World, *, scalars: bool = True) -> None:
    """Adds to the gradients those of the sum of all ranks' losses. scalars: whether temperature and bias have one."""
    (loss * world.size).backward()
    if scalars and is_sharded(model):
        gradients = [scalar.grad for scalar in _scalars(model) if scalar.grad is not None]
        together = world.sum(torch.stack(gradients)) / world.size
        for gradient, total in zip(gradients, together, strict=True):
            gradient.copy_(total)


@contextlib.contextmanager
def exchanging(module: nn.Module, now: bool) -> Generator[None]:
    """Lets a backward pass inside exchange gradients, or only add to them.

    With FSDP2 each pass exchanges: what is added up is then the rank's own part, not the whole model's gradients.
    """
    with contextlib.nullcontext() if now or not isinstance(module, DistributedDataParallel) else module.no_sync():
        yield


def is_sharded(model: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def over_ranks(
    loss: torch.Tensor, gradients: Sequence[torch.Tensor], world: World
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the full batch's loss, and the norm of all gradients together: the same on every rank. Scalars.

    loss: this rank's share. gradients: as `backward` leaves them.
    """
    pieces = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
    copies = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
    loss = loss.detach()
    total, squares = world.sum(torch.stack([loss, _sum_of_squares(pieces, loss)]))
    return total, (squares + _sum_of_squares(copies, loss)).sqrt()


def _sum_of_squares(tensors: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
    if not tensors:
        return torch.zeros_like(like)
    norms = torch._foreach_norm(tensors)  # pyright: ignore
    return torch.stack(norms).to(like.dtype).square().sum()


def _scalars(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.ndim == 0]


def _settle(replicas: DistributedDataParallel, model: CLIP, config: "Config") -> None:
    """Runs one pair forward and backward, and drops the gradients.

    DDP packs gradients anew after its first pass, and where three or more ranks add up a number, the order in which
    they do depends on its place. So a resumed run would differ in the last bit from one that was never interrupted.
    """
    patches = torch.zeros(1, config.tokens, model.config.image.patch_values, dtype=torch.uint8)
    positions = torch.zeros(1, config.tokens, dtype=torch.int16)
    features: Any = replicas(patches, positions, torch.zeros(1, config.text_tokens, dtype=torch.int32))
    torch.stack([each.sum() for each in features if each is not None]).sum().backward()
    replicas.zero_grad(set_to_none=True)
