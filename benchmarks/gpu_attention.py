"""The part `attention` of gpu_check: every kernel against plain math in float64, forward and backward; and its time.

Torch alone is needed here; flash-attn and xformers where they are installed.
"""

import math
from collections.abc import Callable

import torch

from model.attention import Backend, Sequences, attention, packed_attention, why_not

from .gpu_part import Context

_BACKENDS: tuple[Backend, ...] = ("sdpa", "flash", "xformers")
_SHAPES = ((17, 64), (50, 80), (197, 64), (257, 104))
"""(tokens, head dim): 16, 49, 196 and 256 patches with the class token; the heads of L/14, H/14 and bigG/14."""
_HEADS = 4
_TIMED_TOKENS = (17, 37, 50, 77, 128, 197, 257)
_LENGTHS = (3, 17, 1, 50, 9)
"""Of packed sequences."""


def kernels_equal_math(context: Context) -> None:
    """A kernel's largest error may be twice that of plain math in the same precision, and two steps of that precision:
    the rule by which flash-attn's own tests judge."""
    dtypes = (torch.bfloat16, torch.float16) if context.on_gpu else (torch.float32,)
    for dtype in dtypes:
        for backend in _BACKENDS:
            if reason := why_not(backend, context.device.type, dtype, 64):
                context.row(backend=backend, dtype=_name(dtype), result=f"skipped: {reason}")
                continue
            for num_tokens, head_dim in _SHAPES[:2] if context.quick else _SHAPES:
                for causal in (False, True):
                    _compare(context, backend, dtype, num_tokens, head_dim, causal)
            if backend == "flash" or not context.on_gpu:
                _compare_packed(context, backend, dtype)
    if context.on_gpu:
        _time(context)


def _compare(
    context: Context, backend: Backend, dtype: torch.dtype, num_tokens: int, head_dim: int, causal: bool
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(4, num_tokens, 3, _HEADS, head_dim, device=context.device).to(dtype)
    towards = torch.randn(4, num_tokens, _HEADS, head_dim, device=context.device).to(dtype)

    def found(name: Backend, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return _both_ways(lambda x: attention(x, name, causal=causal), qkv.to(precision), towards.to(precision))

    _judge(
        context, backend, dtype, f"{num_tokens} tokens of {head_dim}{', causal' if causal else ''}",
        found(backend, dtype), found("math", dtype), found("math", torch.float64),
    )  # fmt: skip


def _compare_packed(context: Context, backend: Backend, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    total = sum(_LENGTHS)
    qkv = torch.randn(total, 3, _HEADS, 64, device=context.device).to(dtype)
    towards = torch.randn(total, _HEADS, 64, device=context.device).to(dtype)
    offsets = torch.tensor([0, *_LENGTHS], device=context.device).cumsum(0).to(torch.int32)
    sequences = Sequences(offsets, max(_LENGTHS))

    def found(name: Backend, precision: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return _both_ways(
            lambda x: packed_attention(x, sequences, name, causal=True), qkv.to(precision), towards.to(precision)
        )

    _judge(
        context, backend, dtype, "packed sequences of 64, causal",
        found(backend, dtype), found("math", dtype), found("math", torch.float64),
    )  # fmt: skip


def _both_ways(
    call: Callable[[torch.Tensor], torch.Tensor], qkv: torch.Tensor, towards: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and gradient."""
    leaf = qkv.detach().clone().requires_grad_()
    out = call(leaf)
    out.backward(towards)
    assert leaf.grad is not None
    return out.detach().double(), leaf.grad.double()


Pair = tuple[torch.Tensor, torch.Tensor]


def _judge(
    context: Context, backend: Backend, dtype: torch.dtype, what: str, own: Pair, plain: Pair, exact: Pair
) -> None:
    errors: list[float] = []
    passed = True
    for mine, same_precision, reference in zip(own, plain, exact, strict=True):
        error = float((mine - reference).abs().max())
        allowed = 2 * float((same_precision - reference).abs().max())
        allowed += 2 * torch.finfo(dtype).eps * float(reference.abs().max())
        passed &= math.isfinite(error) and error <= allowed
        errors += [error, allowed]
    name = f"{backend}, {_name(dtype)}, {what}"
    detail = f"forward {errors[0]:.2g} (at most {errors[1]:.2g}), backward {errors[2]:.2g} (at most {errors[3]:.2g})"
    context.row(
        backend=backend,
        dtype=_name(dtype),
        shape=what,
        forward_error=errors[0],
        forward_allowed=errors[1],
        backward_error=errors[2],
        backward_allowed=errors[3],
        result=context.judge(passed, f"{name}: largest error {detail}"),
    )


def _time(context: Context) -> None:
    """Forward and backward at 64k tokens in all, which tells from which length each kernel pays."""
    for num_tokens in _TIMED_TOKENS:
        for backend in ("math", *_BACKENDS):
            if why_not(backend, "cuda", torch.bfloat16, 64) or not context.enough_time(2, "the kernels' times"):
                continue
            batch = 65_536 // num_tokens
            qkv = torch.randn(batch, num_tokens, 3, 12, 64, device=context.device, dtype=torch.bfloat16)
            towards = torch.randn(batch, num_tokens, 12, 64, device=context.device, dtype=torch.bfloat16)
            leaf = qkv.requires_grad_()
            for _ in range(3):
                attention(leaf, backend).backward(towards)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(10):
                attention(leaf, backend).backward(towards)
            end.record()
            end.synchronize()
            context.row(
                backend=backend, dtype="bfloat16", shape=f"{num_tokens} tokens of 64, {batch} sequences",
                milliseconds=start.elapsed_time(end) / 10, result="measured",
            )  # fmt: skip


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
