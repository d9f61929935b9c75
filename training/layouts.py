"""A folder in, the held-out set in it out: which of the layouts it has is told by what lies in it.

`shards`: NNNNN.tar with JPEGs and captions. `webdataset`: SPLIT/*.tar as clip_benchmark writes them. `folders`: a
folder for each class. `captions`: pictures named by one of Karpathy's JSON files.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from evaluation.classes import CLASS_NAMES_FILE, ClassList, read_class_file
from evaluation.folders import PICTURES, class_folders, holds_pictures
from evaluation.imagenet import read_metadata_module, search_path
from evaluation.karpathy import karpathy_split
from pipeline.loader import Settings
from pipeline.still_shards import tar_samples
from pipeline.stills import Preprocess, Still

from .held_out import HeldOut, ShardSet, StillSet, folder_classes

Layout = Literal["auto", "shards", "webdataset", "folders", "captions"]
DEFAULT_SPLIT = "test"
_TYPE_FILE = "dataset_type.txt"


@dataclass(frozen=True)
class Source:
    """What the user says of a held-out set; None: nothing."""

    data: Path
    layout: Layout = "auto"
    captions: Path | None = None
    split: str | None = None
    classes: Path | None = None
    wnids: Path | None = None
    preprocess: Preprocess | None = None


def open_held_out(source: Source, settings: Settings) -> tuple[HeldOut, list[str]]:
    """Returns the set, and what to tell the user of it, a phrase each. Raises ValueError in one line."""
    if not source.data.is_dir():
        raise ValueError(f"--data {source.data}: no such folder")
    layout = found_layout(source) if source.layout == "auto" else source.layout
    _refuse_unused(layout, source)
    if layout == "captions":
        return _captions(source, settings), []
    classes = None if source.classes is None else _read_classes(source.classes)
    if layout == "shards":
        return ShardSet(source.data, settings, source.preprocess, classes), []
    if layout == "webdataset":
        return _webdataset(source, settings, classes)
    found = class_folders(source.data, classes, source.wnids, search_path())
    stills = [Still(path) for path in found.paths]
    named = ClassList(found.class_source, found.names, {}, found.templates)
    preprocess = source.preprocess or Preprocess()
    held_out = StillSet(found.layout, settings, preprocess, stills, labels=found.labels, classes=named)
    left_out = f"{len(found.left_out)} folders are none of the {len(found.names)} classes and were left out"
    return held_out, [left_out] if found.left_out else []


def found_layout(source: Source) -> Layout:
    """Returns the layout of a folder. Raises ValueError where it has none of them."""
    if source.captions is not None:
        return "captions"
    if any(source.data.glob("*.tar")):
        return "shards"
    if any(source.data.glob(f"{source.split or DEFAULT_SPLIT}/*.tar")):
        return "webdataset"
    if holds_pictures(source.data):
        return "folders"
    inside = sorted({path.parent.name for path in source.data.glob("*/*.tar")})
    deeper = [entry.name for entry in sorted(source.data.iterdir()) if entry.is_dir() and holds_pictures(entry)]
    if inside:
        advice = (
            f"its folder {source.data / inside[0]} has some; give that, or --split {inside[0]} for webdataset's layout"
        )
    elif deeper:
        advice = f"its folder {source.data / deeper[0]} has class folders; give that"
    elif any(path.suffix.lower() in PICTURES for path in source.data.iterdir()):
        advice = (
            f"its pictures have no class; of pictures with captions make shards (python ingest.py folder {source.data} "
            "--out DIR) and give those"
        )
    else:
        advice = "give the folder of the .tar files or of the class folders, or --captions dataset_coco.json"
    raise ValueError(f"--data {source.data}: no .tar shards in it, and no folders of pictures; {advice}")


def _refuse_unused(layout: Layout, source: Source) -> None:
    takes: Mapping[str, tuple[object, tuple[Layout, ...]]] = {
        "--captions": (source.captions, ("captions",)),
        "--split": (source.split, ("captions", "webdataset")),
        "--classes": (source.classes, ("shards", "webdataset", "folders")),
        "--wnids": (source.wnids, ("folders",)),
    }
    for flag, (value, layouts) in takes.items():
        if value is not None and layout not in layouts:
            raise ValueError(f"{flag} {value} is of no use for {source.data}, whose layout is {layout}; leave it out")
    if layout == "captions" and source.captions is None:
        raise ValueError("--layout captions needs --captions FILE.json, such as Karpathy's dataset_coco.json")


def _read_classes(file: Path) -> ClassList:
    return read_metadata_module(file, str(file)) if file.suffix == ".py" else read_class_file(file)


def _captions(source: Source, settings: Settings) -> HeldOut:
    assert source.captions is not None
    split = source.split or DEFAULT_SPLIT
    found = karpathy_split(source.captions, source.data, split)
    captions = [caption.encode() for caption in found.captions], np.array(found.image_of_caption, np.int64)
    stills = [Still(path) for path in found.paths]
    return StillSet(f"captions: {split}", settings, source.preprocess or Preprocess(), stills, captions=captions)


def _webdataset(source: Source, settings: Settings, classes: ClassList | None) -> tuple[HeldOut, list[str]]:
    folder, preprocess = source.data, source.preprocess or Preprocess()
    if (folder / _TYPE_FILE).is_file() and (folder / _TYPE_FILE).read_text().strip().lower() == "multilabel":
        raise ValueError(f"--data {folder}: {_TYPE_FILE} says multilabel, which is not measured here")
    tars = sorted(folder.glob(f"{source.split or DEFAULT_SPLIT}/*.tar")) or sorted(folder.glob("*.tar"))
    if not tars:
        raise ValueError(f"--data {folder}: no {source.split or DEFAULT_SPLIT}/*.tar in it; give another --split")
    samples, damaged = tar_samples(tars)
    stills = [sample.still for sample in samples]
    labels = [sample.class_id for sample in samples]
    named = folder_classes(folder, classes)
    if named is not None:
        return StillSet("webdataset", settings, preprocess, stills, labels=labels, classes=named), damaged
    captions = [text for sample in samples for text in sample.captions]
    if not captions:
        raise ValueError(
            f"--data {folder}: its samples have no captions, and there is no {CLASS_NAMES_FILE}; write that there, one "
            "name a line, or give --classes FILE.json"
        )
    owners = np.repeat(np.arange(len(samples)), [len(sample.captions) for sample in samples])
    return StillSet("webdataset", settings, preprocess, stills, captions=(captions, owners)), damaged
