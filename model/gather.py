"""Rows of all ranks side by side, with gradients: what the losses exchange between processes.

Without a group, or alone in one, nothing is sent and a tensor comes back as it is. Every rank must bring as many rows,
call in the same order, and go backward too: a backward pass is a collective of its own. Works with NCCL and gloo.

Shapes: W ranks, R rows of one rank, C = W * R rows of all, in the order of ranks.
"""

from typing import Any

import torch
import torch.distributed as dist


def _collective(name: str, old_name: str) -> Any:
    """torch 2.13 warns of the old name, and releases before it may know no other."""
    return getattr(dist, name, None) or getattr(dist, old_name)


_ALL_GATHER = _collective("all_gather_single", "all_gather_into_tensor")
_REDUCE_SCATTER = _collective("reduce_scatter_single", "reduce_scatter_tensor")


def world_size(group: dist.ProcessGroup | None) -> int:
    """Returns how many ranks a group has; 1 without one."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """Returns this process's rank in its group; 0 without one."""
    return 0 if group is None else dist.get_rank(group)


def gathered(rows: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Returns the rows of all ranks, [C, ...], on each rank. rows: [R, ...].

    Each rank's gradient is what all ranks' losses together ask of its rows: a reduce-scatter.
    """
    if world_size(group) == 1:
        return rows
    found: Any = _Gather.apply(rows, group)
    return found


def exchanged(parts: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """Returns what every rank has for this one, [W, R]. parts: [C], of which rank r gets the r-th part of R."""
    if world_size(group) == 1:
        return parts[None]
    found: Any = _Exchange.apply(parts, group)
    return found.unflatten(0, (world_size(group), -1))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, rows: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.group = group
        found = rows.new_empty(len(rows) * world_size(group), *rows.shape[1:])
        _ALL_GATHER(found, rows.contiguous(), group=group)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grad_outputs
        found = grad.new_empty(len(grad) // world_size(ctx.group), *grad.shape[1:])
        _REDUCE_SCATTER(found, grad.contiguous(), group=ctx.group)
        return found, None


class _Exchange(torch.autograd.Function):
    """Its gradient goes back the same way."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, parts: torch.Tensor, group: dist.ProcessGroup
    ) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(parts, group)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        return _all_to_all(grad_outputs[0], ctx.group), None


def _all_to_all(parts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    found = torch.empty_like(parts, memory_format=torch.contiguous_format)
    dist.all_to_all_single(found, parts.contiguous(), group=group)
    return found
