"""Measures a trained run on shards: `python validate.py runs/demo --data data/emoji/zero_shot`.

Zero-shot classification where the folder has a classnames.txt, image-text retrieval where it has none. Prints a table
and, as the last line, one JSON object.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import torch
import tyro

from evaluation.classes import CLASS_NAMES_FILE, prompts, read_classes
from evaluation.report import MAX_PICTURES, Sheet, draw, format_table
from evaluation.retrieval import recall
from evaluation.zero_shot import best_names, class_weights, nearest_neighbour_baseline, top_k
from model.clip import CLIP
from model.presets import from_json
from pipeline.index import open_index
from pipeline.loader import EVALUATION_BATCH_SIZE, Loader, Settings
from pipeline.sources import is_remote
from pipeline.tokens import token_geometry
from training import checkpoint
from training.config import resolved_device


@dataclass(frozen=True)
class Validate:
    """Measure a run on a shard set: zero-shot where it has classes, retrieval where it has not."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, such as runs/demo."""
    data: str
    """A folder of shards that was held out of training."""
    baseline: str | None = None
    """The shards that were trained on: also measure the nearest training picture by pixels, to compare with."""
    report: Path | None = None
    """Draw the run's curves and a sheet of pictures with the model's best names, as this PNG."""
    decoder: Literal["dali", "turbo"] = "turbo"
    device: Literal["auto", "cuda", "cpu"] = "auto"
    vocabulary: Path | None = None
    """The tokenizer's vocabulary file; by default the one trained with, or that of an installed package."""


class ShardSet:
    """A held-out shard set, decoded for one geometry: whole images, squeezed to the square; first captions."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        """Raises ValueError, in one line, for a folder without usable shards or with a class list that does not fit."""
        self.folder = folder
        index = open_index([folder])
        self.loader = Loader(index, None, settings)
        self.sample_ids = index.usable_ids()
        self.names: list[str] = []
        self.templates: list[str] = []
        self.labels = index.usable_class_ids()
        if (folder / CLASS_NAMES_FILE).is_file():
            self.names, self.templates = read_classes(folder)
            if not -1 < self.labels.max() < len(self.names):
                found = f"class {self.labels.max()}" if self.labels.max() >= 0 else "no sample with a class (KEY.cls)"
                raise ValueError(
                    f"{folder}: {CLASS_NAMES_FILE} names {len(self.names)} classes, the shards have {found}"
                )

    def image_features(self, model: CLIP) -> tuple[torch.Tensor, npt.NDArray[np.bool_]]:
        """Returns image features [N, E], and which samples could be decoded [N]."""
        device = model.logit_scale.device
        images: list[torch.Tensor] = []
        valid: list[torch.Tensor] = []
        with evaluating(model):
            for batch in self.loader.evaluation_batches(self.sample_ids):
                valid.append(batch.valid)
                images.append(model.encode_image(batch.patches.to(device), batch.positions.to(device)).cpu())
        return torch.cat(images), torch.cat(valid).numpy()

    def captions(self) -> list[bytes]:
        """Returns the first caption of each sample; empty where it cannot be read."""
        reader = self.loader.reader
        texts = reader.captions(reader.locate_ids(self.sample_ids), np.zeros(len(self.sample_ids), np.int64))
        return [text if isinstance(text, bytes) else b"" for text in texts]

    def text_features(self, model: CLIP, captions: Sequence[bytes]) -> torch.Tensor:
        """Returns the features of captions, float32 [len(captions), E]."""
        ids = torch.from_numpy(self.loader.encoder.encode(captions))
        device = model.logit_scale.device
        with evaluating(model):
            return torch.cat([model.encode_text(part.to(device)).cpu() for part in ids.split(EVALUATION_BATCH_SIZE)])

    def class_features(self, model: CLIP) -> torch.Tensor:
        """Returns the classes' vectors, float32 [C, E], from the prompts that the folder gives."""
        texts = [text.encode() for text in prompts(self.names, self.templates)]
        return class_weights(self.text_features(model, texts), len(self.names))

    def pixels(self, sample_ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Returns what the encoder sees of samples, flattened, uint8 [N, D]; and which could be decoded [N]."""
        batches = list(self.loader.evaluation_batches(sample_ids))
        pixels = np.concatenate([batch.patches.flatten(1).numpy() for batch in batches])
        return pixels, np.concatenate([batch.valid.numpy() for batch in batches])


class evaluating:
    """A model in evaluation mode without gradients, put back as it was."""

    def __init__(self, model: CLIP) -> None:
        self._model, self._was_training = model, model.training
        self._no_grad = torch.inference_mode()

    def __enter__(self) -> None:
        self._model.eval()
        self._no_grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._no_grad.__exit__(*error)
        self._model.train(self._was_training)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what the user can mend."""
    config = tyro.cli(Validate, args=arguments, description=__doc__)
    try:
        results = validate(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(json.dumps(results))
    return 0


def validate(config: Validate) -> dict[str, Any]:
    """Measures what the data allows, prints the table and returns the numbers."""
    data = local_folder("--data", config.data)
    baseline = None if config.baseline is None else local_folder("--baseline", config.baseline)
    model, settings, step = load_run(config.run, config)
    shards = ShardSet(data, settings)
    if not shards.names and (baseline or config.report):
        raise ValueError(f"--baseline and --report need classes, and {config.data} has no {CLASS_NAMES_FILE}")
    images, valid = shards.image_features(model)
    results: dict[str, Any] = {"run": str(config.run), "data": config.data, "step": step}
    results |= {"num_images": int(valid.sum()), "num_bad": int((~valid).sum())}
    rows: list[tuple[str, str]] = []
    if shards.names:
        classes = shards.class_features(model)
        results |= _zero_shot(shards, images, classes, valid)
        if baseline:
            results["pixel_baseline_top1"] = pixel_baseline(shards, baseline, settings)
        labels = {
            "zero_shot_top1": "zero-shot top-1",
            "zero_shot_top5": "zero-shot top-5",
            "chance": "chance, top-1",
            "pixel_baseline_top1": "nearest training picture by pixels, top-1",
        }
        rows += [(label, _percent(results[key])) for key, label in labels.items() if key in results]
        if config.report:
            draw(config.run, config.report, sheet(shards, model, images, classes, valid, results))
            results["report"] = str(config.report)
    else:
        keep = torch.from_numpy(valid)
        texts = shards.text_features(model, shards.captions())
        results |= recall(images[keep], texts[keep], np.arange(int(valid.sum())))
        sides = {"retrieval_image_r": "image for a caption, R@", "retrieval_text_r": "caption for an image, R@"}
        for start, label in sides.items():
            found = {key: value for key, value in results.items() if key.startswith(start)}
            rows += [(label + key.removeprefix(start), _percent(value)) for key, value in found.items()]
        rows.append(("chance, R@1", _percent(1 / results["num_images"])))
    print(f"{config.run} at step {step:,} on {config.data}: {results['num_images']:,} pictures")
    print(format_table(("measure", "value"), rows))
    return results


def local_folder(flag: str, source: str) -> Path:
    """Returns the folder that a flag names. Raises ValueError for a URL: its classes would not be found."""
    if is_remote(source):
        raise ValueError(f"{flag} {source} is a URL; copy the shards and their {CLASS_NAMES_FILE} to a folder first")
    return Path(source)


def zero_shot_accuracy(model: CLIP, shards: ShardSet) -> dict[str, float]:
    """Returns zero_shot_top1 and zero_shot_top5 of a model on a shard set with classes."""
    images, valid = shards.image_features(model)
    found = _zero_shot(shards, images, shards.class_features(model), valid)
    return {name: found[name] for name in ("zero_shot_top1", "zero_shot_top5")}


def load_run(run: Path, config: Validate) -> tuple[CLIP, Settings, int]:
    """Returns a run's newest model, what its batches look like, and its step. Raises ValueError where there is none."""
    try:
        recorded = json.loads((run / "config.json").read_text())
    except FileNotFoundError:
        raise ValueError(f"{run} is not a run folder: it has no config.json; `python train.py` makes one") from None
    except ValueError:
        raise ValueError(f"{run / 'config.json'} is damaged; train again with --resume never") from None
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
    model = CLIP(encoders, grid=geometry.grid, text_tokens=recorded["text_tokens"])
    model.load_state_dict(last.model_tensors())
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


def pixel_baseline(shards: ShardSet, train_folder: Path, settings: Settings) -> float:
    """Returns the top-1 of naming each picture after the nearest training picture, as the encoder sees both.

    Training pictures are those whose caption is a class name. Raises ValueError where there are none.
    """
    train = ShardSet(train_folder, settings)
    class_of = {name.encode(): i for i, name in enumerate(shards.names)}
    train_labels = np.array([class_of.get(caption, -1) for caption in train.captions()])
    if (train_labels < 0).all():
        raise ValueError(f"--baseline {train_folder}: no caption there is one of the {len(class_of):,} class names")
    pictures: list[npt.NDArray[Any]] = []
    for side, labels in ((train, train_labels), (shards, shards.labels)):
        labelled = np.flatnonzero(labels >= 0)
        pixels, valid = side.pixels(side.sample_ids[labelled])
        pictures += [pixels[valid], labels[labelled[valid]]]
    return nearest_neighbour_baseline(*pictures)


def sheet(
    shards: ShardSet,
    model: CLIP,
    images: torch.Tensor,
    classes: torch.Tensor,
    valid: npt.NDArray[np.bool_],
    results: dict[str, Any],
) -> Sheet:
    """Returns what the report draws: pictures spread over the set, with the model's three best names for each."""
    able = np.flatnonzero(valid & (shards.labels >= 0))
    chosen = np.random.default_rng(0).permutation(able)[:MAX_PICTURES]
    found = best_names(
        images[torch.from_numpy(chosen)], classes, shards.names, 3, logit_scale=float(model.logit_scale.detach().exp())
    )
    reader = shards.loader.reader
    jpegs = [jpeg for jpeg in reader.images(reader.locate_ids(shards.sample_ids[chosen])) if isinstance(jpeg, bytes)]
    assert len(jpegs) == len(chosen), "a picture that was decoded a moment ago is gone"
    return Sheet(
        zero_shot_top1=results["zero_shot_top1"],
        num_images=len(able),
        num_classes=len(shards.names),
        pictures=[_picture(jpeg) for jpeg in jpegs],
        true_names=[shards.names[label] for label in shards.labels[chosen]],
        best_names=[[name for name, _ in best] for best in found],
        scores=[[score for _, score in best] for best in found],
        pixel_baseline=results.get("pixel_baseline_top1"),
    )


def _zero_shot(
    shards: ShardSet, images: torch.Tensor, classes: torch.Tensor, valid: npt.NDArray[np.bool_]
) -> dict[str, Any]:
    able = valid & (shards.labels >= 0)
    found = top_k(images[torch.from_numpy(able)], classes, shards.labels[able])
    return {**found, "num_classes": len(shards.names), "chance": 1 / len(shards.names)}


def _picture(jpeg: bytes) -> npt.NDArray[np.uint8]:
    pixels = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    assert pixels is not None
    return np.asarray(pixels, np.uint8)


def _percent(share: float) -> str:
    return f"{share:.2%}"


if __name__ == "__main__":
    sys.exit(main())
