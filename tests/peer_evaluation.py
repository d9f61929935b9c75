"""What open_clip and clip_benchmark measure, for tests/test_interop_evaluation.py: run by .venv-peers, on its own.

`metadata FILE`: writes open_clip's class names and templates as JSON.
`zero_shot FOLDER INPUTS`: for each picture that INPUTS (JSON) names, a class at a chosen place among open_clip's
scores, and what open_clip then measures. `retrieval FOLDER INPUTS`: what clip_benchmark's retrieval code measures, and
open_clip's on the first captions. FOLDER is an export; the last two write INPUTS.npz.
"""

import functools
import json
import sys

import numpy as np
import open_clip
import torch
from open_clip_train.train import get_clip_metrics
from torchvision.datasets.folder import default_loader

# Nearer scores than this could change places by rounding.
MARGIN = 2e-5


def metadata(file):
    values = {
        "names": list(open_clip.IMAGENET_CLASSNAMES),
        "templates": [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES],
    }
    with open(file, "w") as opened:
        json.dump(values, opened)


def load(folder, file):
    with open(file) as opened:
        values = json.load(opened)
    model = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
    config = model.visual.preprocess_cfg
    transform = open_clip.image_transform(
        model.visual.image_size, is_train=False, mean=config["mean"], std=config["std"],
        resize_mode={"shorter": "shortest", "squash": "squash"}[values["resize"]],
        interpolation=values["interpolation"],
    )  # fmt: skip
    images = torch.stack([transform(default_loader(path)) for path in values["pictures"]])
    return model, open_clip.get_tokenizer(f"local-dir:{folder}"), images, values


def unlike(scores, k):
    """Whether the k-th score of a row stands apart from its neighbours."""
    found = scores.sort(descending=True).values
    gaps = found[:-1] - found[1:]
    return (k == 0 or gaps[k - 1] > MARGIN) and (k >= len(gaps) or gaps[k] > MARGIN)


def zero_shot(folder, file):
    model, tokenizer, images, values = load(folder, file)
    templates = [functools.partial(str.replace, template, "{c}") for template in values["templates"]]
    classifier = open_clip.build_zero_shot_classifier(model, tokenizer, values["names"], templates)
    with torch.no_grad():
        features = model.encode_image(images, normalize=True)
    scores = features @ classifier
    wanted = zip(values["places"], scores, strict=True)
    places = [next(k for k in range(first, 100) if unlike(row, k)) for first, row in wanted]
    labels = torch.stack([row.argsort(descending=True)[k] for k, row in zip(places, scores, strict=True)])
    # As open_clip_train's `accuracy` counts, which itself fails with NumPy 2.4.
    hits = scores.topk(5).indices.eq(labels[:, None]).double()
    np.savez(
        f"{file}.npz", features=features, classes=classifier.T, labels=labels, images=images,
        top1=hits[:, :1].sum(1).mean(), top5=hits.sum(1).mean(),
    )  # fmt: skip


def retrieval(folder, file):
    from clip_benchmark.metrics import zeroshot_retrieval

    model, tokenizer, images, values = load(folder, file)
    captions = values["captions"]
    halves = [(images[rows], captions[rows]) for rows in (slice(0, 8), slice(8, None))]
    found = zeroshot_retrieval.evaluate(model, halves, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    with torch.no_grad():
        features = model.encode_image(images, normalize=True)
        texts = model.encode_text(tokenizer([text for each in captions for text in each]), normalize=True)
        first = model.encode_text(tokenizer([each[0] for each in captions]), normalize=True)
    theirs = get_clip_metrics(features, first, 100.0)
    np.savez(
        f"{file}.npz", features=features, texts=texts,
        image=[found[f"image_retrieval_recall@{k}"] for k in (1, 5, 10)],
        text=[found[f"text_retrieval_recall@{k}"] for k in (1, 5, 10)],
        first_image=[theirs[f"text_to_image_R@{k}"] for k in (1, 5, 10)],
        first_text=[theirs[f"image_to_text_R@{k}"] for k in (1, 5, 10)],
    )  # fmt: skip


if __name__ == "__main__":
    {"metadata": metadata, "zero_shot": zero_shot, "retrieval": retrieval}[sys.argv[1]](*sys.argv[2:])
