"""A folder of class folders in, labelled paths and class names out: ImageNet and its relatives, or anybody's own.

Four kinds, told by the folders' names: wnids (ImageNet, Sketch; A and R with 200 of them), class numbers (V2), the
folders of ObjectNet, and names. Scored are the classes that have a folder, and no others.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .classes import (
    CLASS_NAMES_FILE,
    DEFAULT_TEMPLATE,
    TEMPLATES_FILE,
    ClassList,
    read_classes,
    read_json,
    read_templates,
)
from .imagenet import NUM_CLASSES, imagenet_classes, imagenet_wnids

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
_WNID = re.compile(r"n\d{8}")
_NUMBER = re.compile(r"\d+")
OBJECTNET_FILES = ("folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json")
"""They come with ObjectNet, in its folder `mappings`: folder -> label, and the 113 labels that ImageNet has too."""


@dataclass(frozen=True)
class LabelledPaths:
    """Pictures and their classes."""

    layout: str
    paths: list[Path]
    labels: list[int]
    """Which of `names` each picture shows."""
    names: list[str]
    templates: list[str]
    class_source: str
    left_out: list[str]
    """Folders that are none of the classes."""


def class_folders(folder: Path, classes: ClassList | None, wnids: Path | None, path: Sequence[str]) -> LabelledPaths:
    """Returns the pictures of a folder of class folders.

    classes: the user's names and templates, which come before all others. wnids: a file with the order of ImageNet's
    classes. path: where packages are looked for (`imagenet.search_path`). Raises ValueError, in one line, where the
    folders' classes or their names are not known.
    """
    subfolders = sorted(entry.name for entry in _subfolders(folder))
    if not subfolders:
        raise ValueError(f"{folder}: no folder in it, so no class; give the folder that holds the class folders")
    kind = _kind(folder, subfolders)
    mappings = _objectnet_mappings(folder) if kind == "names" else None
    if wnids is not None and kind != "wnids":
        raise ValueError(f"--wnids {wnids}: the folders in {folder} are not named by wnids; leave it out")
    if kind == "wnids":
        named = _by_wnid(folder, subfolders, classes, wnids, path)
    elif kind == "numbers":
        named = _by_number(folder, subfolders, classes, path)
    elif mappings is not None and (classes is None or not (classes.names or classes.by_folder)):
        kind, named = "ObjectNet", _by_objectnet(mappings, subfolders, classes, path)
    else:
        named = _by_name(folder, subfolders, classes)
    paths, labels = list[Path](), list[int]()
    for label, name in enumerate(named.by_folder):
        found = pictures_below(folder / name)
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(f"{folder}: no picture in its {len(named.by_folder)} class folders ({', '.join(PICTURES)})")
    return LabelledPaths(
        f"class folders: {kind}",
        paths,
        labels,
        list(named.by_folder.values()),
        list(named.templates),
        named.source,
        [name for name in subfolders if name not in named.by_folder],
    )


def pictures_below(folder: Path) -> list[Path]:
    """Returns the picture files in a folder and the folders in it, in order; hidden ones do not count."""
    found: list[Path] = []
    for root, _, files in os.walk(folder, followlinks=True):
        found += [Path(root) / name for name in files if name.lower().endswith(PICTURES) and not name.startswith(".")]
    return sorted(found)


def holds_pictures(folder: Path) -> bool:
    """Returns whether some sub-folder of a folder holds a picture itself."""
    return any(path.suffix.lower() in PICTURES for entry in _subfolders(folder) for path in entry.iterdir())


def _subfolders(folder: Path) -> list[Path]:
    """Those that may be classes: not hidden ones, nor what macOS leaves in archives (__MACOSX)."""
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]


def _kind(folder: Path, subfolders: Sequence[str]) -> str:
    for kind, form in (("wnids", _WNID), ("numbers", _NUMBER)):
        fitting = [name for name in subfolders if form.fullmatch(name)]
        if len(fitting) == len(subfolders):
            return kind
        # One name among numbers is a folder gone astray; one number among names is a class, such as a year.
        if len(fitting) > 0.9 * len(subfolders):
            strange = next(name for name in subfolders if name not in fitting)
            raise ValueError(f"{folder}: {strange} is not of the {kind} that the other class folders are; move it away")
    return "names"


def _by_wnid(
    folder: Path, subfolders: Sequence[str], classes: ClassList | None, wnids: Path | None, path: Sequence[str]
) -> ClassList:
    if classes is not None and classes.by_folder:
        if wnids is not None:
            raise ValueError(
                f"--wnids {wnids}: {classes.source} says which folder is which class; leave one of them out"
            )
        return _chosen(folder, subfolders, classes, classes.templates or imagenet_classes(path).templates)
    if wnids is not None:
        order = _read_wnids(wnids)
    elif len(subfolders) == NUM_CLASSES:
        order = list(subfolders)  # the classes of ImageNet are its wnids, sorted
    else:
        order = imagenet_wnids(path)
    if strange := sorted(set(subfolders) - set(order)):
        raise ValueError(
            f"{folder}: {strange[0]} is none of the {len(order)} classes; give names by folder "
            '(--classes FILE.json, "names": {"n01440764": "tench", ...}) or --wnids FILE'
        )
    given = _with_imagenet(classes, path)
    if len(given.names) != len(order):
        raise ValueError(f"{given.source} names {len(given.names)} classes, and there are {len(order)} wnids")
    name_of = dict(zip(order, given.names, strict=True))
    return ClassList(given.source, (), {name: name_of[name] for name in subfolders}, given.templates)


def _by_number(folder: Path, subfolders: Sequence[str], classes: ClassList | None, path: Sequence[str]) -> ClassList:
    if classes is not None and classes.by_folder:
        return _chosen(folder, subfolders, classes, classes.templates or _own_templates(folder))
    numbers = sorted(subfolders, key=int)
    if classes is not None and classes.names:
        given = ClassList(classes.source, classes.names, {}, classes.templates or _own_templates(folder))
    elif (folder / CLASS_NAMES_FILE).is_file():
        names, templates = read_classes(folder)
        given = ClassList(str(folder / CLASS_NAMES_FILE), names, {}, classes.templates if classes else templates)
    elif [int(name) for name in numbers] == list(range(NUM_CLASSES)):
        given = _with_imagenet(classes, path)
    else:
        raise ValueError(
            f"{folder}: what its {len(numbers)} numbered classes are called is not known; write {CLASS_NAMES_FILE} "
            'there, one name a line, or give --classes FILE.json ({"names": [...], "templates": [...]})'
        )
    if int(numbers[-1]) >= len(given.names):
        raise ValueError(f"{folder}: class {numbers[-1]} is beyond the {len(given.names)} that {given.source} names")
    return ClassList(given.source, (), {name: given.names[int(name)] for name in numbers}, given.templates)


def _by_objectnet(
    mappings: Path, subfolders: Sequence[str], classes: ClassList | None, path: Sequence[str]
) -> ClassList:
    """The classes that ImageNet has too, under ObjectNet's own names in lower case, as clip_benchmark scores them."""
    label_of, overlap = (read_json(mappings / name, "ObjectNet's") for name in OBJECTNET_FILES)
    try:
        by_folder = {name: label_of[name].lower() for name in subfolders if label_of.get(name) in overlap}
    except (AttributeError, TypeError):
        raise ValueError(f"{mappings / OBJECTNET_FILES[0]} is not ObjectNet's: an object of folder and label") from None
    if not by_folder:
        raise ValueError(f"{mappings}: its files name none of the class folders; give --classes FILE.json")
    templates = (classes.templates if classes else ()) or imagenet_classes(path).templates
    return ClassList(str(mappings), (), by_folder, templates)


def _by_name(folder: Path, subfolders: Sequence[str], classes: ClassList | None) -> ClassList:
    templates = classes.templates if classes and classes.templates else _own_templates(folder)
    if classes is not None and classes.by_folder:
        return _chosen(folder, subfolders, classes, templates)
    if classes is not None and classes.names:
        if len(classes.names) != len(subfolders):
            raise ValueError(
                f"{classes.source} names {len(classes.names)} classes, and {folder} has {len(subfolders)} class "
                'folders; give names by folder ("names": {"folder": "name", ...})'
            )
        return ClassList(classes.source, (), dict(zip(subfolders, classes.names, strict=True)), templates)
    if any("objectnet" in part.lower() for part in folder.resolve().parts[-3:]):
        raise ValueError(
            f"{folder}: which folders are the 113 classes that ImageNet has too is said by ObjectNet's own mappings/"
            f"{OBJECTNET_FILES[0]} and {OBJECTNET_FILES[1]}; put that folder beside it, or give --classes FILE.json"
        )
    return ClassList("the folders' names", (), {name: name.replace("_", " ") for name in subfolders}, templates)


def _chosen(folder: Path, subfolders: Sequence[str], classes: ClassList, templates: Sequence[str]) -> ClassList:
    by_folder = {name: classes.by_folder[name] for name in subfolders if name in classes.by_folder}
    if not by_folder:
        raise ValueError(f"{classes.source} names none of the class folders in {folder}, such as {subfolders[0]}")
    return ClassList(classes.source, (), by_folder, templates)


def _with_imagenet(classes: ClassList | None, path: Sequence[str]) -> ClassList:
    """The user's names and templates, and ImageNet's for what the user does not give."""
    if classes is not None and classes.names and classes.templates:
        return classes
    installed = imagenet_classes(path)
    if classes is None:
        return installed
    return ClassList(
        f"{classes.source}, {installed.source}",
        classes.names or installed.names, {}, classes.templates or installed.templates,
    )  # fmt: skip


def _own_templates(folder: Path) -> list[str]:
    file = folder / TEMPLATES_FILE
    return read_templates(file) if file.is_file() else [DEFAULT_TEMPLATE]


def _read_wnids(file: Path) -> list[str]:
    try:
        # The first word of a line: lists of wnids often have the names behind them.
        found = [line.split()[0] for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--wnids {file} cannot be read ({error}); give one wnid a line") from None
    if strange := [word for word in found if not _WNID.fullmatch(word)]:
        raise ValueError(f"--wnids {file}: {strange[0]} is no wnid such as n01440764; give one a line")
    if len(set(found)) < len(found):
        raise ValueError(f"--wnids {file}: a wnid stands there twice; give each once, in the order of the classes")
    return found


def _objectnet_mappings(folder: Path) -> Path | None:
    """The folder with ObjectNet's mappings: beside the pictures' folder, in it, or in `mappings` at either place."""
    places = (folder.parent / "mappings", folder.parent, folder / "mappings", folder)
    return next((place for place in places if all((place / name).is_file() for name in OBJECTNET_FILES)), None)
