"""Multi-head attention behind one function, so that which kernel runs is a name and nothing more.

At 49 tokens or fewer attention is under 1 % of a tower's work: what counts here is that nothing is copied around it.

Shapes: B pairs, N tokens, D width, H heads, K head dim.
"""

import difflib
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

Backend = Literal["sdpa", "math"]

_RESOLVED: dict[str, Backend] = {"auto": "sdpa", "sdpa": "sdpa", "math": "math"}
_PLANNED = ("flash", "xformers")


def attention_backend(name: str) -> Backend:
    """Returns the backend that `--attention name` comes to. Raises ValueError for one that is unknown or not built."""
    if name in _RESOLVED:
        return _RESOLVED[name]
    if name in _PLANNED:
        raise ValueError(f"--attention {name} is not built yet; use --attention auto or sdpa")
    close = difflib.get_close_matches(name, _RESOLVED, n=1)
    hint = f"did you mean {close[0]}?" if close else f"choose from {', '.join(_RESOLVED)}"
    raise ValueError(f"--attention {name} is not known; {hint}")


def attention(
    query_BNHK: torch.Tensor, key_BNHK: torch.Tensor, value_BNHK: torch.Tensor, backend: Backend
) -> torch.Tensor:
    """Returns softmax(q k' / sqrt(K)) v, [B, N, H, K]; every token attends to every other. Inputs may be strided views.

    `math` is the plain version that the others are tested against.
    """
    query_BHNK, key_BHNK, value_BHNK = (x.transpose(1, 2) for x in (query_BNHK, key_BNHK, value_BNHK))
    if backend == "math":
        scores_BHNN = query_BHNK @ key_BHNK.transpose(-2, -1) * query_BHNK.shape[-1] ** -0.5
        mixed_BHNK = scores_BHNN.softmax(dim=-1).to(value_BHNK.dtype) @ value_BHNK
    else:
        mixed_BHNK = F.scaled_dot_product_attention(query_BHNK, key_BHNK, value_BHNK)
    return mixed_BHNK.transpose(1, 2)


class SelfAttention(nn.Module):
    """x_BND to x_BND. Query, key and value come from one product; all four projections have biases."""

    def __init__(self, width: int, heads: int, backend: Backend) -> None:
        super().__init__()
        self.heads = heads
        self.backend: Backend = backend
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_BND: torch.Tensor) -> torch.Tensor:
        query_BNHK, key_BNHK, value_BNHK = self.qkv(x_BND).unflatten(-1, (3, self.heads, -1)).unbind(2)
        mixed_BNHK = attention(query_BNHK, key_BNHK, value_BNHK, self.backend)
        return self.out(mixed_BNHK.flatten(2))
