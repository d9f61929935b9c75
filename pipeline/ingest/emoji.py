"""An emoji recipe in, its shard sets out: train, zero_shot, retrieval and, where asked for, retrieval_seen.

`train` holds every style but the held-out ones, as single pictures and as scenes, shuffled; `zero_shot` holds the
held-out pictures with their names as classes; `retrieval` holds scenes in the held-out styles, `retrieval_seen` further
ones in the styles of training. Every choice is a pure function of (seed, split, sample), made before anything is drawn,
so processes and interruptions change no byte.
"""

import enum
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from tqdm import tqdm

from ..files import only_writer, write_text
from .art import Picture, check_renderer, collect
from .groups import plan_groups
from .npm import cache_dir, fetch_all
from .recipe import EmojiRecipe, differences, record
from .scenes import Placed, Scene, paint, plan_portrait, plan_scene, plan_single
from .shards import Sample, Shard, split_shards, write_shards

DRAWING = 2
"""Raise it when the same recipe draws other pictures or captions: folders of another number are not continued."""

MAX_CAPTION_ATTEMPTS = 1000

_LATER_KEYS = ("seen_retrieval_scenes", "scenes", "names")
"""Keys that recipe.json holds only where they are not at their defaults, so that older folders are still known."""

_PLANS = {"spread": plan_scene, "grouped": plan_groups}


class Stream(enum.IntEnum):
    """What random numbers are for: two streams never share a key."""

    SINGLE = 0
    SCENE = 1
    RETRIEVAL = 2
    ORDER = 3
    SEEN = 4


def make(recipe: EmojiRecipe, out: Path, workers: int) -> dict[str, Any]:
    """Writes the recipe's shard sets under `out`, or what is missing of them, and returns the summary.

    Finished already: nothing is fetched or written. Raises ValueError, in one line, when `out` holds other data, when
    another process is writing there, and when npm, a package or the renderer is missing.
    """
    _refuse_other_data(recipe, out)
    if (summary := finished(out)) is not None:
        return summary
    check_renderer()
    with only_writer(out):
        write_text(out / "recipe.json", json.dumps(_origin(recipe), indent=1) + "\n")
        packages = [recipe.labels, *recipe.styles]
        pictures = collect(recipe.labels, recipe.styles, fetch_all(packages, cache_dir()))
        shards: list[Shard[Scene]] = []
        plans = plan_splits(recipe, pictures)
        draw = partial(draw_sample, recipe=recipe)
        for split, scenes in plans.items():
            shards += split_shards(out / split, scenes, draw, recipe.samples_per_shard)
        with tqdm(total=sum(map(len, plans.values())), unit=" pictures", desc="drawing", smoothing=0.1) as bar:
            bar.update(sum(len(shard.plans) for shard in shards if shard.complete))

            def advance(shard: Shard[Scene]) -> None:
                bar.update(len(shard.plans))

            write_shards(shards, workers, advance)
        _write_classes(out / "zero_shot", plans["zero_shot"])
        return _write_summary(out, plans, shards)


def finished(out: Path) -> dict[str, Any] | None:
    """Returns the summary of a finished folder, or None when something is still to be written."""
    try:
        summary = json.loads((out / "summary.json").read_text())
    except FileNotFoundError:
        return None
    files = [out / split / name for split, entry in summary["splits"].items() for name in entry["files"]]
    return summary if all(file.exists() for file in files) else None


def plan_splits(recipe: EmojiRecipe, pictures: Sequence[Picture]) -> dict[str, list[Scene]]:
    """Returns every sample of each split, planned but not drawn. pictures: those of all styles of the recipe."""
    if recipe.names:
        if unknown := sorted(set(recipe.names) - {picture.name for picture in pictures}):
            raise ValueError(f'names: no picture is called "{unknown[0]}"; labels are those of {recipe.labels.package}')
        pictures = [picture for picture in pictures if picture.name in recipe.names]
    held_out = {style.style for style in recipe.styles if style.split == "held_out"}
    train = [picture for picture in pictures if picture.style not in held_out]
    unseen = [picture for picture in pictures if picture.style in held_out]
    class_ids = {name: i for i, name in enumerate(dict.fromkeys(picture.name for picture in unseen))}
    splits = {
        "train": _plan_train(recipe, train),
        "zero_shot": [plan_portrait(picture, class_ids[picture.name], recipe.image_size) for picture in unseen],
        "retrieval": _plan_retrieval(recipe, _by_style(unseen), Stream.RETRIEVAL, recipe.retrieval_scenes),
    }
    if recipe.seen_retrieval_scenes:
        seen = _plan_retrieval(recipe, _by_style(train), Stream.SEEN, recipe.seen_retrieval_scenes)
        splits["retrieval_seen"] = seen
    return splits


def draw_sample(scene: Scene, recipe: EmojiRecipe) -> Sample:
    """Returns a planned scene as a sample: painted, encoded (4:2:0), and described."""
    pixels, boxes = paint(scene, recipe.image_size, recipe.trim)
    pictures = [placed.picture for placed in scene.placed]
    first = pictures[0]
    single = not scene.placed[0].place
    objects = [_describe(placed, box) for placed, box in zip(scene.placed, boxes, strict=True)]
    details: dict[str, Any] = {"source": first.package, "objects": objects, "background": scene.background.phrase}
    if single:
        details["hexcode"] = first.hexcode
    return Sample(
        jpeg=simplejpeg.encode_jpeg(
            pixels, recipe.jpeg_quality, colorspace="RGB", colorsubsampling="420", fastdct=False
        ),
        width=recipe.image_size,
        height=recipe.image_size,
        caption=scene.caption,
        url=" ".join(picture.url for picture in pictures),
        license=first.license,
        style=first.style,
        name=first.name if single else None,
        other_captions={"tags": ", ".join(scene.tags)} if scene.tags else {},
        class_id=scene.class_id,
        details=details,
    )


def _random(seed: int, stream: Stream, sample: int, attempt: int = 0) -> np.random.Generator:
    """Returns the numbers of one sample. Counter-based (Philox), so no sample's numbers depend on another's."""
    key = np.array([seed, stream << 56 | attempt << 40 | sample], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def _plan_train(recipe: EmojiRecipe, pictures: Sequence[Picture]) -> list[Scene]:
    size, seed = recipe.image_size, recipe.seed
    repeated = [picture for picture in pictures for _ in range(recipe.singles_per_picture)]
    scenes = [plan_single(_random(seed, Stream.SINGLE, i), picture, size) for i, picture in enumerate(repeated)]
    styles = _by_style(pictures)
    for i in range(recipe.train_scenes):
        rng = _random(seed, Stream.SCENE, i)
        scenes.append(_PLANS[recipe.scenes](rng, styles[int(rng.integers(len(styles)))], size))
    order = _random(seed, Stream.ORDER, 0).permutation(len(scenes))
    return [scenes[int(i)] for i in order]


def _plan_retrieval(
    recipe: EmojiRecipe, styles: Sequence[Sequence[Picture]], stream: Stream, num_scenes: int
) -> list[Scene]:
    """Returns scenes whose captions are all different, so that each caption has one right image."""
    scenes: dict[str, Scene] = {}
    for i in range(num_scenes):
        for attempt in range(MAX_CAPTION_ATTEMPTS):
            rng = _random(recipe.seed, stream, i, attempt)
            scene = _PLANS[recipe.scenes](rng, styles[int(rng.integers(len(styles)))], recipe.image_size)
            if scenes.setdefault(scene.caption, scene) is scene:
                break
        else:
            key = "retrieval_scenes" if stream is Stream.RETRIEVAL else "seen_retrieval_scenes"
            raise ValueError(f"{key} = {num_scenes} is more than these pictures can tell apart")
    return list(scenes.values())


def _by_style(pictures: Sequence[Picture]) -> list[list[Picture]]:
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.style, []).append(picture)
    return list(groups.values())


def _describe(placed: Placed, box: tuple[int, int, int, int]) -> dict[str, Any]:
    picture = placed.picture
    words = {"size": placed.size or None, "place": placed.place} if placed.place else {}
    return {"name": picture.name, "hexcode": picture.hexcode, "box": box, **words}


def _origin(recipe: EmojiRecipe) -> dict[str, Any]:
    """Returns all that decides what is drawn, as recipe.json keeps it."""
    defaults = {field.name: field.default for field in fields(recipe) if field.name in _LATER_KEYS}
    kept = {key: value for key, value in record(recipe).items() if getattr(recipe, key) != defaults.get(key, ...)}
    return {"drawing": DRAWING, **kept}


def _refuse_other_data(recipe: EmojiRecipe, out: Path) -> None:
    """Raises ValueError when `out` is made from something else, or holds files that no recipe made."""
    path = out / "recipe.json"
    if path.exists():
        if found := differences(json.loads(path.read_text()), _origin(recipe)):
            raise ValueError(
                f"{out} was made by another recipe: {'; '.join(found)}; choose another --out or delete {out}"
            )
    elif strangers := sorted(entry.name for entry in out.glob("*") if entry.name != ".lock"):
        raise ValueError(f"{out} holds other files ({strangers[0]}, ...) and no recipe.json; choose an empty --out")


def _write_classes(folder: Path, scenes: Sequence[Scene]) -> None:
    """Writes the two files that tell zero-shot evaluation the classes, by clip_benchmark's names."""
    names = {scene.class_id: scene.caption for scene in scenes}
    write_text(folder / "classnames.txt", "".join(f"{names[i]}\n" for i in range(len(names))))
    # Training captions of single pictures are bare names, so the bare name is the prompt.
    write_text(folder / "zeroshot_classification_templates.txt", "{c}\n")


def _write_summary(out: Path, plans: dict[str, list[Scene]], shards: Sequence[Shard[Scene]]) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for split, scenes in plans.items():
        mine = [shard for shard in shards if shard.folder == out / split]
        kinds = Counter(
            f"{scene.placed[0].picture.style}, {'scenes' if scene.placed[0].place else 'singles'}" for scene in scenes
        )
        files = [path.name for shard in mine for path in (shard.tar, shard.parquet)]
        splits[split] = {"samples": len(scenes), "made_of": dict(sorted(kinds.items())), "files": files}
    summary = {"splits": splits, "classes": len({scene.class_id for scene in plans["zero_shot"]})}
    write_text(out / "summary.json", json.dumps(summary, indent=1) + "\n")
    return summary
