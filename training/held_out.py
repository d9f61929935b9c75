"""Held-out sets as a model is measured on them: pictures, and either classes or captions, whatever their layout.

ShardSet reads shards as training does; StillSet reads pictures of any format through Pillow.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evaluation.classes import CLASS_NAMES_FILE, ClassList, prompts, read_classes
from evaluation.zero_shot import class_weights, top_k
from model.clip import CLIP
from pipeline.captions import CaptionEncoder, caption_encoder
from pipeline.index import IntArray, open_index
from pipeline.loader import EVALUATION_BATCH_SIZE, Loader, Settings
from pipeline.sources import is_remote
from pipeline.stills import Preprocess, Still, still_batches, whole_picture

from .distributed import World
from .fields import Config

Faults = list[tuple[str, str]]
"""(name of a picture, reason why it could not be read)."""


@dataclass(frozen=True)
class ImageFeatures:
    """What a model says of a set's pictures."""

    features: torch.Tensor
    """float32 [N, E]; of a bad picture, anything."""
    valid: npt.NDArray[np.bool_]
    """[N]: which could be read."""
    faults: Faults


class HeldOut(ABC):
    """A set of N pictures and what is known of them."""

    def __init__(
        self,
        layout: str,
        settings: Settings,
        labels: IntArray,
        preprocess: Preprocess | None,
        encoder: CaptionEncoder,
    ) -> None:
        self.layout = layout
        self.settings = settings
        self.labels = labels
        """int64 [N]: class ids; -1 where a picture has none."""
        self.preprocess = preprocess
        """None: decoded as in training, squeezed to the square."""
        self.names: list[str] = []
        """Of the classes; none where the set is for retrieval."""
        self.templates: list[str] = []
        self.class_source: str | None = None
        self.encoder = encoder

    @abstractmethod
    def captions(self) -> tuple[list[bytes], IntArray]:
        """Returns the captions, and which picture each belongs to, int64 [captions]."""

    def whole_pictures(self, rows: Sequence[int]) -> list[npt.NDArray[np.uint8]]:
        """Returns pictures at their own size, uint8 [height, width, 3]; rows: of readable ones."""
        return [whole_picture(still) for still in self._stills(rows)]

    def image_features(self, model: CLIP) -> ImageFeatures:
        """Returns the model's features of all pictures."""
        device = model.logit_scale.device
        images: list[torch.Tensor] = []
        valid: list[npt.NDArray[np.bool_]] = []
        found: Faults = []
        with evaluating(model):
            for patches, positions, here, faults in self._batches():
                found += faults
                valid.append(here)
                images.append(model.encode_image(patches.to(device), positions.to(device)).cpu())
        return ImageFeatures(torch.cat(images), np.concatenate(valid), found)

    def text_features(self, model: CLIP, captions: Sequence[bytes]) -> torch.Tensor:
        """Returns the features of captions, float32 [len(captions), E]."""
        device, parts = model.logit_scale.device, list[torch.Tensor]()
        with evaluating(model):
            # Parts: the ids of 80 prompts for each of 1000 classes are of no use after their features.
            for start in range(0, len(captions), EVALUATION_BATCH_SIZE):
                ids = torch.from_numpy(self.encoder.encode(captions[start : start + EVALUATION_BATCH_SIZE]))
                parts.append(model.encode_text(ids.to(device)).cpu())
        return torch.cat(parts)

    def class_features(self, model: CLIP) -> torch.Tensor:
        """Returns the classes' vectors, float32 [C, E], from the set's names and templates."""
        texts = [text.encode() for text in prompts(self.names, self.templates)]
        return class_weights(self.text_features(model, texts), len(self.names))

    def zero_shot(self, found: ImageFeatures, class_features: torch.Tensor) -> dict[str, float]:
        """Returns zero_shot_top1 and zero_shot_top5 over the readable pictures that have a class."""
        able = found.valid & (self.labels >= 0)
        return top_k(found.features[torch.from_numpy(able)], class_features, self.labels[able], names=self.names)

    def preprocessing(self, model: CLIP) -> dict[str, Any]:
        """Returns what becomes of a picture before the encoder, to be recorded with a result."""
        preprocess, config = self.preprocess or Preprocess(), model.config
        return {
            "resize": preprocess.resize,
            "interpolation": preprocess.interpolation,
            "image_size": self.settings.geometry.image_size,
            "mean": list(config.pixel_mean),
            "std": list(config.pixel_std),
            "decoder": "pillow" if self.preprocess else self.settings.decoder,
        }

    @abstractmethod
    def _stills(self, rows: Sequence[int]) -> list[Still]:
        """Returns the pictures of some rows, unread."""

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.bool_], Faults]]:
        """Yields (patches, positions, which are valid, what is wrong with the others)."""
        preprocess, stills = self.preprocess or Preprocess(), self._stills(range(len(self.labels)))
        batches = still_batches(stills, self.settings.geometry, preprocess, EVALUATION_BATCH_SIZE)
        for number, batch in enumerate(batches):
            first = number * EVALUATION_BATCH_SIZE
            valid = np.ones(len(batch.patches), np.bool_)
            valid[list(batch.faults)] = False
            faults = [(stills[first + slot].name, reason) for slot, reason in batch.faults.items()]
            yield batch.patches, batch.positions, valid, faults


class StillSet(HeldOut):
    """Pictures of any format, with labels and class names, or with captions."""

    def __init__(
        self,
        layout: str,
        settings: Settings,
        preprocess: Preprocess,
        stills: Sequence[Still],
        *,
        labels: Sequence[int] | None = None,
        classes: ClassList | None = None,
        captions: tuple[list[bytes], IntArray] | None = None,
    ) -> None:
        """Either labels and classes, or captions and the picture of each."""
        known = np.full(len(stills), -1) if labels is None else np.asarray(labels)
        encoder = caption_encoder(settings.tokenizer, settings.text_tokens, vocabulary=settings.vocabulary)
        super().__init__(layout, settings, known.astype(np.int64), preprocess, encoder)
        self.stills = stills
        self._captions = captions
        if classes is not None:
            set_classes(self, classes)

    def captions(self) -> tuple[list[bytes], IntArray]:
        assert self._captions is not None, "a set with classes has no captions"
        return self._captions

    def _stills(self, rows: Sequence[int]) -> list[Still]:
        return [self.stills[row] for row in rows]


class ShardSet(HeldOut):
    """A held-out shard set: the usable samples of its index, whole images, first captions."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        preprocess: Preprocess | None = None,
        classes: ClassList | None = None,
    ) -> None:
        """Raises ValueError, in one line, for a folder without usable shards or with a class list that does not fit.

        preprocess: None for what training's decoder does. classes: instead of what the folder says.
        """
        self.folder = folder
        self.index = open_index([folder])
        self.loader = Loader(self.index, None, settings)
        self.sample_ids = self.index.usable_ids()
        super().__init__("shards", settings, self.index.usable_class_ids(), preprocess, self.loader.encoder)
        if found := folder_classes(folder, classes):
            set_classes(self, found)

    @property
    def num_rejected(self) -> int:
        """Samples that the index left out."""
        return self.index.num_samples - self.index.num_usable

    def captions(self) -> tuple[list[bytes], IntArray]:
        """Returns the first caption of each sample; empty where it cannot be read."""
        reader, num = self.loader.reader, len(self.sample_ids)
        texts = reader.captions(reader.locate_ids(self.sample_ids), np.zeros(num, np.int64))
        return [text if isinstance(text, bytes) else b"" for text in texts], np.arange(num)

    def pixels(self, sample_ids: IntArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
        """Returns what the encoder sees of samples, flattened, uint8 [N, D]; and which could be decoded [N]."""
        batches = list(self.loader.evaluation_batches(sample_ids))
        pixels = np.concatenate([batch.patches.flatten(1).numpy() for batch in batches])
        return pixels, np.concatenate([batch.valid.numpy() for batch in batches])

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, npt.NDArray[np.bool_], Faults]]:
        if self.preprocess is not None:
            yield from super()._batches()
            return
        for batch in self.loader.evaluation_batches(self.sample_ids):
            faults = [(f"{each.shard}: {each.key}", each.reason) for each in batch.rejected]
            yield batch.patches, batch.positions, batch.valid.numpy(), faults

    def _stills(self, rows: Sequence[int]) -> list[Still]:
        found = self.loader.reader.locate_ids(self.sample_ids[np.asarray(rows, np.int64)])
        return [
            Still(Path(self.index.shards[shard].path), offset, size, self.loader.reader.key(shard, row))
            for shard, row, offset, size in zip(
                found.shard.tolist(),
                (found.sample_ids - self.index.first_ids[found.shard]).tolist(),
                found.image_offset.tolist(),
                found.image_bytes.tolist(),
                strict=True,
            )
        ]


def folder_classes(folder: Path, classes: ClassList | None) -> ClassList | None:
    """Returns the classes of a shard set: the user's, completed by what the folder's files say; None without any.

    Raises ValueError where the user's are by folder, of which shards have none, or lack names.
    """
    there = (folder / CLASS_NAMES_FILE).is_file()
    names, templates = read_classes(folder) if there else ([], [])
    if classes is None:
        return ClassList(str(folder / CLASS_NAMES_FILE), names, {}, templates) if there else None
    if classes.by_folder:
        raise ValueError(f'--classes {classes.source} names classes by folder; for shards, "names" is a list')
    if not (classes.names or names):
        raise ValueError(f"--classes {classes.source} has no names, nor has {folder} a {CLASS_NAMES_FILE}; give them")
    return ClassList(classes.source, classes.names or names, {}, classes.templates or templates or ["{c}"])


def set_classes(held_out: HeldOut, classes: ClassList) -> None:
    """Gives a set its classes. Raises ValueError where its labels are not among them."""
    highest, num_classes = int(held_out.labels.max(initial=-1)), len(classes.names)
    if not -1 < highest < num_classes:
        found = f"class {highest}" if highest >= 0 else "no sample with a class (KEY.cls)"
        raise ValueError(f"{classes.source} names {num_classes} classes, the shards have {found}")
    held_out.names, held_out.templates = list(classes.names), list(classes.templates)
    held_out.class_source = classes.source


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


def local_folder(flag: str, source: str) -> Path:
    """Returns the folder that a flag names. Raises ValueError for a URL: its classes would not be found."""
    if is_remote(source):
        raise ValueError(f"{flag} {source} is a URL; copy the shards and their {CLASS_NAMES_FILE} to a folder first")
    return Path(source)


def zero_shot_on(config: Config, settings: Settings, world: World) -> Callable[[CLIP], dict[str, float]] | None:
    """Returns what measures a model on --eval-data, or None where this rank does not: all ranks of a model that is
    cut over them do, else rank 0. Raises ValueError where there are no classes."""
    if not config.eval_data or not (world.is_first or config.shard):
        return None
    held_out = ShardSet(local_folder("--eval-data", config.eval_data), settings)
    if not held_out.names:
        raise ValueError(f"--eval-data {config.eval_data} has no {CLASS_NAMES_FILE}; give a shard set with classes")
    return functools.partial(zero_shot_accuracy, shards=held_out)


def zero_shot_accuracy(model: CLIP, shards: HeldOut) -> dict[str, float]:
    """Returns zero_shot_top1 and zero_shot_top5 of a model on a set with classes."""
    return shards.zero_shot(shards.image_features(model), shards.class_features(model))
