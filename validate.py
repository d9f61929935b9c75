"""Measures a trained run on held-out data: `python validate.py runs/demo --data data/emoji/zero_shot`.

Zero-shot classification where the data have classes, image-text retrieval where they have captions. Shards, webdataset
folders of clip_benchmark, a folder for each class (ImageNet and its relatives), COCO and Flickr30k by Karpathy's JSON.
Prints a table and, as the last line, one JSON object.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.command import exit_code, missing_packages_in_one_line

if __name__ == "__main__":
    missing_packages_in_one_line()

import numpy as np
import numpy.typing as npt
import torch
import tyro

from evaluation.report import MAX_PICTURES, Sheet, draw
from evaluation.retrieval import recall, shared_captions
from evaluation.zero_shot import best_names, nearest_neighbour_baseline
from model.clip import CLIP
from model.presets import from_json
from pipeline.loader import Settings
from pipeline.stills import MISSING, Interpolation, Preprocess, Resize
from pipeline.table import format_table
from pipeline.tokens import token_geometry
from training import checkpoint
from training.config import resolved_device
from training.ema import EMA
from training.held_out import Faults, HeldOut, ImageFeatures, ShardSet, local_folder, zero_shot_accuracy
from training.initial import recorded_values
from training.layouts import Layout, Source, open_held_out
from training.stages import weights_folder

__all__ = ["ShardSet", "Validate", "local_folder", "main", "validate", "zero_shot_accuracy"]

_NAMED = 10
"""Of the pictures that could not be read, so many are named."""


@dataclass(frozen=True)
class Validate:
    """Measure a run on held-out data: zero-shot where it has classes, retrieval where it has captions."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, such as runs/demo; of one with stages, the last finished stage counts."""
    data: str
    """A folder that was held out of training: of shards, of SPLIT/*.tar, of class folders, or of pictures."""
    captions: Path | None = None
    """Karpathy's JSON with the captions of the pictures in --data, such as dataset_coco.json."""
    split: str | None = None
    """Which split of it, or which folder of tars; by default test."""
    classes: Path | None = None
    """A JSON file {"names": [...], "templates": [...]}; "names" may be an object from folder to name. By default what
    lies beside the data, for ImageNet and its relatives what an installed open_clip or clip_benchmark holds."""
    wnids: Path | None = None
    """The wnids of --classes' names in order, one a line; by default those of an installed timm or clip_benchmark."""
    layout: Layout = "auto"
    resize: Resize | None = None
    """How a picture becomes a square: both sides to its side (by default), or the shorter side and then the middle."""
    interpolation: Interpolation | None = None
    """By default bilinear. With this or --resize, shards too are read by Pillow, not by --decoder."""
    baseline: str | None = None
    """The shards that were trained on: also measure the nearest training picture by pixels, to compare with."""
    report: Path | None = None
    """Draw the run's curves and a sheet of pictures with the model's best names, as this PNG."""
    decoder: Literal["dali", "turbo"] = "turbo"
    """Of shards; all else is read by Pillow."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    ema: bool = False
    """Measure the moving average of the weights, which a run with --ema keeps."""
    vocabulary: Path | None = None
    """The tokenizer's vocabulary file; by default the one trained with, or that of an installed package."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    print(json.dumps(validate(tyro.cli(Validate, args=arguments, description=__doc__))))


def validate(config: Validate) -> dict[str, Any]:
    """Measures what the data allow, prints the table and returns the numbers."""
    data = local_folder("--data", config.data)
    baseline = None if config.baseline is None else local_folder("--baseline", config.baseline)
    run, chosen = weights_folder(config.run)
    if chosen is not None:
        print(chosen, file=sys.stderr)
    config = replace(config, run=run)
    model, settings, step = load_run(run, config)
    source = Source(
        data, config.layout, config.captions, config.split, config.classes, config.wnids, _preprocess(config)
    )
    held_out, remarks = open_held_out(source, settings)
    for remark in remarks:
        print(f"{config.data}: {remark}", file=sys.stderr)
    if not held_out.names and (baseline or config.report):
        raise ValueError(f"--baseline and --report need classes, and {config.data} has none")
    images = held_out.image_features(model)
    name_faults(images.faults)
    if not images.valid.any():
        raise ValueError(f"{config.data}: none of its {len(images.valid):,} pictures could be read")
    results: dict[str, Any] = {"run": str(config.run), "data": config.data, "step": step, "layout": held_out.layout}
    results |= {"preprocessing": held_out.preprocessing(model), **_counts(held_out, images)}
    if held_out.names:
        rows = _zero_shot(config, model, held_out, images, baseline, results)
    else:
        rows = _retrieval(model, held_out, images, results)
    print(f"{config.run} at step {step:,} on {config.data}: {results['num_images']:,} pictures")
    print(format_table(("measure", "value"), rows))
    return results


def name_faults(faults: Faults) -> None:
    """Says on stderr which pictures could not be read, the first of them by name."""
    for name, reason in faults[:_NAMED]:
        print(f"left out: {name}: {reason}", file=sys.stderr)
    if len(faults) > _NAMED:
        print(f"left out: {len(faults) - _NAMED:,} more", file=sys.stderr)


def _counts(held_out: HeldOut, images: ImageFeatures) -> dict[str, Any]:
    counts: dict[str, Any] = {"num_images": int(images.valid.sum()), "num_bad": len(images.faults)}
    if isinstance(held_out, ShardSet):
        return counts | {"num_rejected": held_out.num_rejected}
    return counts | {
        "num_missing": sum(reason == MISSING for _, reason in images.faults),
        "bad": [f"{name}: {reason}" for name, reason in images.faults[:_NAMED]],
    }


def _zero_shot(
    config: Validate, model: CLIP, held_out: HeldOut, images: ImageFeatures, baseline: Path | None,
    results: dict[str, Any],
) -> list[tuple[str, str]]:  # fmt: skip
    """Adds what classes allow to the results; returns the rows of the table."""
    num_classes = len(held_out.names)
    classes = held_out.class_features(model)
    results |= {**held_out.zero_shot(images, classes), "num_classes": num_classes, "chance": 1 / num_classes}
    results |= {"class_source": held_out.class_source, "num_templates": len(held_out.templates)}
    if baseline:
        results["pixel_baseline_top1"] = pixel_baseline(held_out, baseline)
    labels = {
        "zero_shot_top1": "zero-shot top-1",
        "zero_shot_top5": "zero-shot top-5",
        "chance": "chance, top-1",
        "pixel_baseline_top1": "nearest training picture by pixels, top-1",
    }
    if config.report:
        draw(config.run, config.report, sheet(held_out, model, images, classes, results))
        results["report"] = str(config.report)
    return [(label, _percent(results[key])) for key, label in labels.items() if key in results]


def _retrieval(model: CLIP, held_out: HeldOut, images: ImageFeatures, results: dict[str, Any]) -> list[tuple[str, str]]:
    """Adds what captions allow to the results; returns the table's rows. A bad picture takes its captions along."""
    captions, owners = held_out.captions()
    kept = images.valid[owners]
    asked = [captions[row] for row in np.flatnonzero(kept)]
    texts = held_out.text_features(model, asked)
    place = np.cumsum(images.valid) - 1
    results["num_captions"] = int(kept.sum())
    recalls = recall(images.features[torch.from_numpy(images.valid)], texts, place[owners[kept]])
    results |= recalls | shared_captions(asked, owners[kept])
    rows: list[tuple[str, str]] = []
    sides = {"retrieval_image_r": "image for a caption, R@", "retrieval_text_r": "caption for an image, R@"}
    for start, label in sides.items():
        found = {key: value for key, value in recalls.items() if key.startswith(start)}
        rows += [(label + key.removeprefix(start), _percent(value)) for key, value in found.items()]
    rows.append(("chance, image R@1", _percent(1 / results["num_images"])))
    return rows + _limits(results)


def _limits(results: dict[str, Any]) -> list[tuple[str, str]]:
    """What captions that several pictures have cost the best of models; nothing where there are none."""
    if not results["num_shared_captions"]:
        return []
    return [
        ("captions that another picture has too", f"{results['num_shared_captions']:,} of {results['num_captions']:,}"),
        ("so at most, image for a caption R@1", _percent(results["retrieval_image_r1_limit"])),
        ("so at most, caption for an image R@1", _percent(results["retrieval_text_r1_limit"])),
    ]


def _preprocess(config: Validate) -> Preprocess | None:
    """What the flags say; None where they say nothing, so that each layout does as it does."""
    if config.resize is None and config.interpolation is None:
        return None
    return Preprocess(config.resize or Preprocess.resize, config.interpolation or Preprocess.interpolation)


def load_run(run: Path, config: Validate) -> tuple[CLIP, Settings, int]:
    """Returns a run's newest model, what its batches look like, and its step. Raises ValueError where there is none."""
    recorded = recorded_values(run)
    last, passed_over = checkpoint.newest(run)
    for phrase in passed_over:
        print(f"passed over a damaged checkpoint: {phrase}", file=sys.stderr)
    if last is None:
        raise ValueError(f"{run} has no whole checkpoint yet; let train.py reach its first one")
    device = resolved_device(config.device, cuda=torch.cuda.is_available())
    encoders = from_json(recorded["encoders"])
    geometry = token_geometry(
        recorded["tokens"],
        image_reduction=recorded["image_reduction"],
        image_size=recorded["image_size"],
        patch=encoders.image.patch,
    )
    state = last.model_tensors()
    if config.ema:
        averages = last.tensors(EMA)
        if not averages:
            raise ValueError(
                f"{run} keeps no moving average of its weights; leave --ema out, or train with --ema 0.9999"
            )
        state |= averages
    bias = float(state["logit_bias"]) if "logit_bias" in state else None
    model = CLIP(encoders, grid=geometry.grid, text_tokens=recorded["text_tokens"], logit_bias=bias)
    model.load_state_dict(state)
    settings = Settings(
        geometry,
        recorded["text_tokens"],
        config.decoder,
        tokenizer=encoders.text.tokenizer,
        vocabulary=config.vocabulary or _recorded_vocabulary(recorded),
    )
    return model.to(device), settings, last.state["step"]


def _recorded_vocabulary(recorded: dict[str, Any]) -> Path | None:
    """The file that a run was trained with, while it is there; any other of its tokenizer holds the same bytes."""
    name = recorded.get("vocabulary")
    return Path(name) if name is not None and Path(name).is_file() else None


def pixel_baseline(held_out: HeldOut, train_folder: Path) -> float:
    """Returns the top-1 of naming each picture after the nearest training picture, as the encoder sees both.

    Training pictures are those whose caption is a class name. Raises ValueError where there are none.
    """
    if not isinstance(held_out, ShardSet) or held_out.preprocess is not None:
        raise ValueError(f"--baseline {train_folder} needs --data of shards, without --resize and --interpolation")
    train = ShardSet(train_folder, held_out.settings)
    class_of = {name.encode(): i for i, name in enumerate(held_out.names)}
    train_labels = np.array([class_of.get(caption, -1) for caption in train.captions()[0]])
    if (train_labels < 0).all():
        raise ValueError(f"--baseline {train_folder}: no caption there is one of the {len(class_of):,} class names")
    pictures: list[npt.NDArray[Any]] = []
    for side, labels in ((train, train_labels), (held_out, held_out.labels)):
        labelled = np.flatnonzero(labels >= 0)
        pixels, valid = side.pixels(side.sample_ids[labelled])
        pictures += [pixels[valid], labels[labelled[valid]]]
    return nearest_neighbour_baseline(*pictures)


def sheet(
    held_out: HeldOut, model: CLIP, images: ImageFeatures, classes: torch.Tensor, results: dict[str, Any]
) -> Sheet:
    """Returns what the report draws: pictures spread over the set, with the model's three best names for each."""
    able = np.flatnonzero(images.valid & (held_out.labels >= 0))
    chosen = np.random.default_rng(0).permutation(able)[:MAX_PICTURES]
    scale = float(model.logit_scale.detach().exp())
    found = best_names(images.features[torch.from_numpy(chosen)], classes, held_out.names, 3, logit_scale=scale)
    return Sheet(
        zero_shot_top1=results["zero_shot_top1"],
        num_images=len(able),
        num_classes=len(held_out.names),
        pictures=held_out.whole_pictures(chosen.tolist()),
        true_names=[held_out.names[label] for label in held_out.labels[chosen]],
        best_names=[[name for name, _ in best] for best in found],
        scores=[[score for _, score in best] for best in found],
        pixel_baseline=results.get("pixel_baseline_top1"),
    )


def _percent(share: float) -> str:
    return f"{share:.2%}"


if __name__ == "__main__":
    sys.exit(main())
