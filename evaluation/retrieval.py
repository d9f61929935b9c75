"""Retrieval among images and captions, both ways, with any number of captions an image."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from .ranks import Ids, hit_rates, ranks, to_ids


def recall(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    image_of_text: Ids,
    ks: Sequence[int] = (1, 5, 10),
    *,
    batch_size: int = 1024,
) -> dict[str, float]:
    """Returns recall at each k, both ways: retrieval_image_r1, ..., retrieval_text_r1, ...

    `image`: the share of captions whose image is among the k best images. `text`: the share of images that find any of
    their captions among the k best captions. A tie counts as wrong (see `ranks.ranks`); captions of the same image do
    not compete. An image without a caption is there to be found by mistake, but asks nothing itself.
    image_features: [N, E]; text_features: [M, E]; image_of_text: M rows of image_features. Any batch_size gives the
    same.
    """
    owners, num_images = to_ids(image_of_text), len(image_features)
    assert len(owners) == len(text_features), f"{len(owners)} owners for {len(text_features)} captions"
    if not len(owners):
        raise ValueError("no caption to retrieve with; choose data whose samples have captions")
    assert 0 <= owners.min() <= owners.max() < num_images, "image_of_text names an image that is not there"
    of_text = ranks(text_features, owners, image_features, np.arange(num_images), batch_size)
    asking = np.unique(owners)
    of_image = ranks(image_features[torch.from_numpy(asking)], asking, text_features, owners, batch_size)
    return {**hit_rates(of_text, ks, "retrieval_image_r"), **hit_rates(of_image, ks, "retrieval_text_r")}


def shared_captions(captions: Sequence[bytes], image_of_text: Ids) -> dict[str, float]:
    """Returns what captions that stand at several images cost, however good a model is.

    num_shared_captions: captions whose text another image has too. retrieval_image_r1_limit, retrieval_text_r1_limit:
    what recall at 1 cannot exceed. Such a caption asks for its own image alone, as open_clip and clip_benchmark count
    it too: one text finds one image, so all others of that text miss theirs; and an image finds a caption only by a
    text that is its own, since equal ones tie.
    image_of_text: int, one a caption.
    """
    owners = to_ids(image_of_text).tolist()
    images: defaultdict[bytes, Counter[int]] = defaultdict(Counter)
    for caption, owner in zip(captions, owners, strict=True):
        images[caption][owner] += 1
    shared = [found.total() for found in images.values() if len(found) > 1]
    found_at_best = sum(max(found.values()) for found in images.values())
    able = {owner for found in images.values() if len(found) == 1 for owner in found}
    return {
        "num_shared_captions": sum(shared),
        "retrieval_image_r1_limit": found_at_best / len(owners),
        "retrieval_text_r1_limit": len(able) / len(set(owners)),
    }
