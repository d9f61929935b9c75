"""How many wrong answers a model puts before the right one: what zero-shot and retrieval both count.

Scores are cosines, in float32 by NumPy on the CPU, so that no autocast, TF32 or device changes a result. One batch of
queries is scored at a time: memory grows with batch_size x candidates, never with queries x candidates.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Ids = torch.Tensor | npt.NDArray[np.integer] | Sequence[int]

TIE = 1e-6
"""Cosines this near are equal: the same float32 products summed in another order differ by less."""


def unit(features: torch.Tensor) -> npt.NDArray[np.float32]:
    """Returns the rows at length 1, as float32 on the CPU. A row of zeros stays zeros."""
    return torch.nn.functional.normalize(features.detach().float().cpu(), dim=-1).numpy()


def to_ids(ids: Ids) -> npt.NDArray[np.int64]:
    """Returns whole numbers, from wherever they are, as int64 on the CPU."""
    return torch.as_tensor(ids).cpu().numpy().astype(np.int64)


def ranks(
    query_features: torch.Tensor,
    query_groups: npt.NDArray[np.int64],
    candidate_features: torch.Tensor,
    candidate_groups: npt.NDArray[np.int64],
    batch_size: int,
) -> npt.NDArray[np.int64]:
    """Returns, for each query, how many wrong candidates its best right one does not beat. A hit at k is rank < k.

    A candidate is right when its group is the query's; each query must have one. Ties go against the model: a wrong
    candidate is beaten only when it scores lower by more than TIE. So features that all look alike, or are not
    numbers, rank last and not first.
    query_features: [queries, E]; candidate_features: [candidates, E]; groups: int64, one a row.
    """
    queries, candidates = unit(query_features), unit(candidate_features)
    found = np.empty(len(queries), np.int64)
    for start in range(0, len(queries), batch_size):
        rows = slice(start, start + batch_size)
        right = query_groups[rows, None] == candidate_groups
        assert right.any(axis=1).all(), "a query without a right candidate"
        with np.errstate(invalid="ignore"):
            scores = queries[rows] @ candidates.T
            best_right = np.where(right, scores, -np.inf).max(axis=1)
            beaten = scores < best_right[:, None] - TIE
        found[rows] = (~beaten & ~right).sum(axis=1)
    return found


def hit_rates(ranks: npt.NDArray[np.int64], ks: Sequence[int], name: str) -> dict[str, float]:
    """Returns the share of ranks below each k, by the names `name` + k."""
    return {f"{name}{k}": float((ranks < k).mean()) for k in ks}
