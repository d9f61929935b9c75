"""Zero-shot classification: prompt features -> one vector a class -> top-1, top-5 and the best names of a picture.

And the baseline that says whether the task needed a model at all: the label of the nearest training picture, in pixels.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import normalize

from .ranks import Ids, hit_rates, ranks, to_ids, unit

# Pixels less 128 have products of at most 2**14; sums of 1024 of those are whole numbers that float32 holds exactly.
_EXACT_COLUMNS = 1024


def class_weights(prompt_features: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Returns the classes' unit vectors, float32 [C, E]: each prompt at length 1, mean over templates, length 1.

    prompt_features: [C*K, E], class by class with its K templates, the order of `classes.prompts`.
    """
    num_prompts, width = prompt_features.shape
    assert num_prompts > 0, "no prompts"
    assert num_prompts % num_classes == 0, f"{num_prompts} prompts for {num_classes} classes"
    units = normalize(prompt_features.float(), dim=-1)
    return normalize(units.view(num_classes, -1, width).mean(dim=1), dim=-1)


def top_k(
    image_features: torch.Tensor,
    class_features: torch.Tensor,
    labels: Ids,
    ks: Sequence[int] = (1, 5),
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Returns the share of images whose class is among the k best, as zero_shot_top1, zero_shot_top5, ...

    An image's rank is the number of other classes with a score not below its own class's, so a tie counts as wrong:
    two classes that the model cannot tell apart are both missed at k = 1 (see `ranks.ranks`).
    image_features: [N, E]; class_features: [C, E], of any length; labels: N class ids. Any batch_size gives the same.
    names: C, where classes may share one, as `missile` and `sunglasses` are two classes each in ImageNet's usual list.
    No model can tell those apart, and an argmax takes the first: so does this.
    """
    label_ids, num_classes = to_ids(labels), len(class_features)
    assert len(label_ids) == len(image_features), f"{len(label_ids)} labels for {len(image_features)} images"
    if not len(label_ids):
        raise ValueError("no labelled image to classify; choose data whose samples have a cls")
    if (strange := label_ids[(label_ids < 0) | (label_ids >= num_classes)]).size:
        raise ValueError(
            f"label {strange[0]} is not among the {num_classes} classes (0 to {num_classes - 1}); "
            "classnames.txt must be the one that the shards' cls were made with"
        )
    found = ranks(image_features, label_ids, class_features, np.arange(num_classes), batch_size)
    if names is not None:
        found -= _later_namesakes(names)[label_ids]
    return hit_rates(found, ks, "zero_shot_top")


def _later_namesakes(names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Returns how many classes after each one have its name, int64 [C]."""
    seen: Counter[str] = Counter()
    later = np.zeros(len(names), np.int64)
    for i in reversed(range(len(names))):
        later[i] = seen[names[i]]
        seen[names[i]] += 1
    return later


def best_names(
    image_features: torch.Tensor,
    class_features: torch.Tensor,
    names: Sequence[str],
    k: int = 3,
    *,
    logit_scale: float = 100.0,
) -> list[list[tuple[str, float]]]:
    """Returns the k best (name, probability) of each image, best first; equal ones in the order of the names.

    A probability is the softmax over all classes of logit_scale times the cosine. For a few images: scores all at once.
    image_features: [N, E]; class_features: [C, E]; names: C.
    """
    assert len(names) == len(class_features), f"{len(names)} names for {len(class_features)} classes"
    logits = logit_scale * (unit(image_features) @ unit(class_features).T).astype(np.float64)
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    return [[(names[int(i)], float(row[i])) for i in chosen] for row, chosen in zip(shares, best, strict=True)]


def nearest_neighbour_baseline(
    train_pixels: npt.NDArray[np.uint8],
    train_labels: Ids,
    test_pixels: npt.NDArray[np.uint8],
    test_labels: Ids,
    *,
    batch_size: int = 1024,
) -> float:
    """Returns the top-1 of giving each test picture the label of its nearest training picture, by L2 over pixels.

    Exact: no distance is rounded, and of equally near pictures the first counts. So any batch_size gives the same.
    train_pixels: uint8 [N, D]; test_pixels: uint8 [M, D], both of one size and layout. Memory beyond the arguments:
    about 20 * batch_size**2 bytes. 8,000 x 2,000 pictures of 64 x 64: about ten seconds on two cores.
    """
    nearest = _nearest(train_pixels, test_pixels, batch_size)
    return float((to_ids(train_labels)[nearest] == to_ids(test_labels)).mean())


def _nearest(
    train_pixels: npt.NDArray[np.uint8], test_pixels: npt.NDArray[np.uint8], batch_size: int
) -> npt.NDArray[np.int64]:
    """Returns the row of the nearest training picture for each test picture."""
    assert train_pixels.dtype == test_pixels.dtype == np.uint8
    nearest = np.zeros(len(test_pixels), np.int64)
    least = np.full(len(test_pixels), np.inf)
    for first in range(0, len(train_pixels), batch_size):
        train = train_pixels[first : first + batch_size]
        for start in range(0, len(test_pixels), batch_size):
            rows = slice(start, start + batch_size)
            distances = _distances(test_pixels[rows], train)
            best = distances.argmin(axis=1)
            distance = np.take_along_axis(distances, best[:, None], axis=1)[:, 0]
            nearer = distance < least[rows]
            nearest[rows][nearer] = first + best[nearer]
            least[rows][nearer] = distance[nearer]
    return nearest


def _distances(a: npt.NDArray[np.uint8], b: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Returns |b|^2 - 2ab, float64 [rows of a, rows of b]: the squared distance less |a|^2, exact.

    Distances do not change when 128 is taken from both sides, and the products become small enough for float32.
    """
    total = np.zeros((len(a), len(b)))
    for left in range(0, a.shape[1], _EXACT_COLUMNS):
        columns = slice(left, left + _EXACT_COLUMNS)
        x, y = (pixels[:, columns].astype(np.float32) - 128 for pixels in (a, b))
        total += np.einsum("ij,ij->i", y, y)
        total -= 2 * (x @ y.T)
    return total
