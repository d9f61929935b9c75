"""Multi-head attention behind one function, so that which kernel runs is a name and nothing more.

At 49 tokens or fewer attention is under 1 % of a tower's work: what counts there is that nothing is copied around it.
Query, key and value stay packed as one product gave them; kernels that want them packed get them so.

Shapes: B pairs, N tokens, D width, H heads, K head dim; T the tokens of a batch of sequences laid end to end.
"""

import difflib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import nn

from .choices import AttentionName

Backend = Literal["sdpa", "flash", "xformers", "math"]
Token = int | torch.Tensor
"""One token of each sequence: the same place in all, or int64 [B]."""

FLASH_FROM = 128
"""Tokens from which `auto` takes flash-attn on CUDA, where it is installed; below, SDPA's own kernels do as well."""
MAX_HEAD_DIM = 256
"""Of flash-attn and xformers."""
_HALF = (torch.float16, torch.bfloat16)
_DISTRIBUTIONS = {"flash": "flash-attn", "xformers": "xformers"}
_INSTALLED = {
    backend: importlib.util.find_spec(name.replace("-", "_")) is not None for backend, name in _DISTRIBUTIONS.items()
}


@dataclass(frozen=True)
class Sequences:
    """Sequences of different lengths laid end to end."""

    offsets: torch.Tensor
    """int32 [B + 1]: where each begins, and where the last ends."""
    max_length: int
    """No sequence is longer."""


def attention_name(name: str) -> AttentionName:
    """Returns `name` if it names a backend or is `auto`. Raises ValueError, with the closest name, if not."""
    known = {each: each for each in get_args(AttentionName)}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(known)}"
    raise ValueError(f"--attention {name} is not known; {hint}")


def why_not(backend: Backend, device: str, dtype: torch.dtype, head_dim: int) -> str | None:
    """Returns why a backend cannot serve tensors of that device, dtype and head size; None where it can."""
    if backend in ("sdpa", "math"):
        return None
    if device != "cuda":
        return f"it runs on CUDA alone, and this is {device}"
    if not _INSTALLED[backend]:
        return f"{_DISTRIBUTIONS[backend]} is not installed (pip install '.[cuda]')"
    if backend == "flash" and dtype not in _HALF:
        return f"it computes in bf16 or fp16 alone, not in {str(dtype).removeprefix('torch.')} (--precision bf16)"
    if head_dim > MAX_HEAD_DIM or head_dim % 8:
        return f"heads of {head_dim} are no multiple of 8 up to {MAX_HEAD_DIM}"
    return None


def choose(name: AttentionName, num_tokens: int, *, device: str, dtype: torch.dtype, head_dim: int) -> Backend:
    """Returns the backend for sequences of `num_tokens`; for any other name than `auto` that very one.

    `auto` is sdpa, but flash on CUDA from FLASH_FROM tokens where flash-attn can serve. On a CPU SDPA is 2 to 6 times
    as fast as plain math at every length from 5 to 197. Raises ValueError, in one line, where a named one cannot serve.
    """
    if name == "auto":
        long = num_tokens >= FLASH_FROM and why_not("flash", device, dtype, head_dim) is None
        return "flash" if long else "sdpa"
    if reason := why_not(name, device, dtype, head_dim):
        raise ValueError(f"--attention {name} cannot serve: {reason}; use --attention auto or sdpa")
    return name


def attention(qkv_BN3HK: torch.Tensor, backend: Backend, *, causal: bool = False) -> torch.Tensor:
    """Returns softmax(q k' / sqrt(K)) v, [B, N, H, K]. causal: a token attends to none that come after it.

    `math` is the plain version that the others are tested against.
    """
    return _KERNELS[backend](qkv_BN3HK, causal)


def packed_attention(
    qkv_T3HK: torch.Tensor, sequences: Sequences, backend: Backend, *, causal: bool = False
) -> torch.Tensor:
    """Returns what `attention` gives within each sequence, [T, H, K]: no token attends to another sequence.

    Only flash has a kernel for it; any other backend computes one sequence after another, which is for tests.
    """
    if backend == "flash":
        return _flash_packed(qkv_T3HK, sequences, causal)
    parts = qkv_T3HK.split(sequences.offsets.diff().tolist())
    return torch.cat([attention(part[None], backend, causal=causal)[0] for part in parts])


class SelfAttention(nn.Module):
    """x_BND to x_BND. Query, key and value come from one product; all four projections have biases."""

    def __init__(self, width: int, heads: int, name: AttentionName, *, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.name: AttentionName = name
        self.causal = causal
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, x_BND: torch.Tensor, sequences: Sequences | None = None, only: Token | None = None
    ) -> torch.Tensor:
        """x: [B, N, D]; or [T, D] with the sequences that are laid end to end in it.

        only: the one token of each sequence whose result is wanted, [B, D]; no query is computed for the others.
        """
        if only is not None:
            return self._at(x_BND, only)
        qkv = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1))
        num_tokens = qkv.shape[1] if sequences is None else sequences.max_length
        backend = choose(
            self.name, num_tokens, device=qkv.device.type, dtype=qkv.dtype, head_dim=qkv.shape[-1]
        )  # decided where the tensors are seen: autocast and .to() come after construction
        if sequences is None:
            mixed = attention(qkv, backend, causal=self.causal)
        else:
            mixed = packed_attention(qkv, sequences, backend, causal=self.causal)
        return self.out(mixed.flatten(-2))

    def _at(self, x_BND: torch.Tensor, only: Token) -> torch.Tensor:
        width = x_BND.shape[-1]
        query_weight, key_value_weight = self.qkv.weight.split((width, 2 * width))
        query_bias, key_value_bias = self.qkv.bias.split((width, 2 * width))
        query_B1HK = F.linear(token_at(x_BND, only), query_weight, query_bias).unflatten(-1, (1, self.heads, -1))
        key_value_BN2HK = F.linear(x_BND, key_value_weight, key_value_bias).unflatten(-1, (2, self.heads, -1))
        # Checked here too: a named backend that cannot serve is refused, although one query needs no kernel of its own.
        backend = choose(
            self.name, x_BND.shape[1], device=x_BND.device.type, dtype=query_B1HK.dtype, head_dim=query_B1HK.shape[-1]
        )
        seen_BN = _up_to(only, x_BND) if self.causal else None
        mixed_B1HK = one_query_attention(query_B1HK, key_value_BN2HK, backend, seen_BN)
        return self.out(mixed_B1HK.flatten(1))


def token_at(x_BND: torch.Tensor, only: Token) -> torch.Tensor:
    """Returns one token of each sequence, [B, D]."""
    if isinstance(only, int):
        return x_BND[:, only]
    return x_BND[torch.arange(len(x_BND), device=x_BND.device), only]


def _up_to(only: Token, x_BND: torch.Tensor) -> torch.Tensor | None:
    """Returns bool [B, N]: the tokens that a causal query at `only` sees; None where that is all of them."""
    if isinstance(only, int):
        assert only == -1, only
        return None
    return torch.arange(x_BND.shape[1], device=x_BND.device) <= only[:, None]


def one_query_attention(
    query_B1HK: torch.Tensor, key_value_BN2HK: torch.Tensor, backend: Backend, seen_BN: torch.Tensor | None = None
) -> torch.Tensor:
    """Returns what `attention` gives for one query of each sequence, [B, 1, H, K]. seen: the keys that it sees.

    SDPA computes it for every backend but `math`: a product of one row leaves nothing to gain.
    """
    query_BH1K = query_B1HK.transpose(1, 2)
    key_BHNK, value_BHNK = (x.transpose(1, 2) for x in key_value_BN2HK.unbind(2))
    mask_B11N = None if seen_BN is None else seen_BN[:, None, None]
    if backend != "math":
        return F.scaled_dot_product_attention(query_BH1K, key_BHNK, value_BHNK, attn_mask=mask_B11N).transpose(1, 2)
    scores_BH1N = query_BH1K @ key_BHNK.transpose(-2, -1) * query_BH1K.shape[-1] ** -0.5
    if mask_B11N is not None:
        scores_BH1N = scores_BH1N.masked_fill(~mask_B11N, float("-inf"))
    return (scores_BH1N.softmax(dim=-1).to(value_BHNK.dtype) @ value_BHNK).transpose(1, 2)


def _heads_first(qkv_BN3HK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query_BHNK, key_BHNK, value_BHNK = (x.transpose(1, 2) for x in qkv_BN3HK.unbind(2))
    return query_BHNK, key_BHNK, value_BHNK


def _math(qkv_BN3HK: torch.Tensor, causal: bool) -> torch.Tensor:
    query_BHNK, key_BHNK, value_BHNK = _heads_first(qkv_BN3HK)
    scores_BHNN = query_BHNK @ key_BHNK.transpose(-2, -1) * query_BHNK.shape[-1] ** -0.5
    if causal:
        later_NN = torch.ones(scores_BHNN.shape[-2:], dtype=torch.bool, device=scores_BHNN.device).triu(1)
        scores_BHNN = scores_BHNN.masked_fill(later_NN, float("-inf"))
    return (scores_BHNN.softmax(dim=-1).to(value_BHNK.dtype) @ value_BHNK).transpose(1, 2)


def _sdpa(qkv_BN3HK: torch.Tensor, causal: bool) -> torch.Tensor:
    query_BHNK, key_BHNK, value_BHNK = _heads_first(qkv_BN3HK)
    return F.scaled_dot_product_attention(query_BHNK, key_BHNK, value_BHNK, is_causal=causal).transpose(1, 2)


# Imported where they are called: both are optional, and take seconds to import.


def _flash(qkv_BN3HK: torch.Tensor, causal: bool) -> torch.Tensor:
    from flash_attn import flash_attn_qkvpacked_func  # pyright: ignore[reportMissingImports]

    return flash_attn_qkvpacked_func(qkv_BN3HK, causal=causal)


def _flash_packed(qkv_T3HK: torch.Tensor, sequences: Sequences, causal: bool) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_qkvpacked_func  # pyright: ignore[reportMissingImports]

    return flash_attn_varlen_qkvpacked_func(qkv_T3HK, sequences.offsets, sequences.max_length, causal=causal)


def _xformers(qkv_BN3HK: torch.Tensor, causal: bool) -> torch.Tensor:
    from xformers import ops  # pyright: ignore[reportMissingImports]

    bias = ops.LowerTriangularMask() if causal else None
    return ops.memory_efficient_attention(*qkv_BN3HK.unbind(2), attn_bias=bias)


_KERNELS: dict[Backend, Callable[[torch.Tensor, bool], torch.Tensor]] = {
    "math": _math,
    "sdpa": _sdpa,
    "flash": _flash,
    "xformers": _xformers,
}
