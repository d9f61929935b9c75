"""Karpathy's JSON of COCO, Flickr8k and Flickr30k in, paths and captions of one split out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .classes import read_json


@dataclass(frozen=True)
class CaptionedPaths:
    """Pictures and their captions."""

    paths: list[Path]
    """Where each picture is, or would be."""
    captions: list[str]
    image_of_caption: list[int]
    """Which of `paths` each caption belongs to."""


def karpathy_split(file: Path, folder: Path, split: str) -> CaptionedPaths:
    """Returns the pictures of a split, all captions of each; a picture that is not there has its path all the same.

    file: {"images": [{"filepath", "filename", "split", "sentences": [{"raw"}]}]}, where filepath may be absent. folder:
    the pictures are looked for there, with filepath and without it. Raises ValueError, in one line, where the file is
    another or the split has no picture.
    """
    values = read_json(file, "--captions")
    images = cast("dict[str, Any]", values).get("images") if isinstance(values, dict) else None
    if not isinstance(images, list):
        raise ValueError(f'--captions {file} has no list of "images": is it one of Karpathy\'s dataset_*.json?')
    paths, captions, owners = list[Path](), list[str](), list[int]()
    splits: set[str] = set()
    for number, entry in enumerate(cast("list[dict[str, Any]]", images)):
        try:
            splits.add(str(entry["split"]))
            if entry["split"] != split:
                continue
            sentences = [str(sentence["raw"]) for sentence in entry["sentences"]]
            path = _place(folder, str(entry.get("filepath", "")), str(entry["filename"]))
        except (AttributeError, KeyError, TypeError):
            raise ValueError(f"--captions {file}: image {number} lacks filename, split or sentences with raw") from None
        captions += sentences
        owners += [len(paths)] * len(sentences)
        paths.append(path)
    if not captions:
        raise ValueError(
            f"--captions {file}: no caption of split {split!r}; it has {', '.join(sorted(splits)) or 'none'}"
        )
    return CaptionedPaths(paths, captions, owners)


def _place(folder: Path, subfolder: str, name: str) -> Path:
    whole, bare = folder / subfolder / name, folder / name
    return bare if subfolder and not whole.exists() and bare.exists() else whole
