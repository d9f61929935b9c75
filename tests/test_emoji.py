import base64
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from conftest import eventually, process_stat

from pipeline.ingest import emoji
from pipeline.ingest.art import Picture, collect, ink_bounds, match, read_icons, read_labels, render
from pipeline.ingest.npm import cache_dir, fetch, fetch_all, read_json
from pipeline.ingest.recipe import EmojiRecipe, Package, Style, load

ROOT = Path(__file__).parents[1]

LABELS: list[dict[str, Any]] = [
    {"label": "regional indicator A", "hexcode": "1F1E6"},
    {"label": "red apple", "hexcode": "1F34E", "group": 4, "order": 3, "tags": ["fruit", "red"]},
    {"label": "dark skin tone", "hexcode": "1F3FF", "group": 2, "order": 2},
    {"label": "waving hand", "hexcode": "1F44B", "group": 1, "order": 1, "tags": ["hello"]},
    {"label": "flag: Côte d’Ivoire", "hexcode": "1F1E8-1F1EE", "group": 9, "order": 6, "tags": ["CI"]},  # noqa: RUF001
    {"label": "red heart", "hexcode": "2764-FE0F", "group": 0, "order": 4, "tags": ["love"]},
    {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "group": 8, "order": 5},
]
NAMES = [entry["label"] for entry in sorted(LABELS, key=lambda e: e.get("order", 0)) if entry.get("group", 2) != 2]


def block(colour: str, left: int = 4) -> dict[str, Any]:
    return {"body": f'<rect x="{left}" y="8" width="16" height="8" fill="{colour}"/>'}


def make_package(folder: Path, package: str, files: dict[str, Any]) -> Package:
    """Writes a package as npm names and packs it, and returns what a recipe says of it."""
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = package.rpartition("@")
    path = folder / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for file, value in files.items():
            data = json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return Package(package, integrity(path))


def integrity(path: Path) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def icon_files(icons: dict[str, Any], aliases: dict[str, Any], chars: dict[str, str]) -> dict[str, Any]:
    return {
        "icons.json": {"prefix": "x", "width": 32, "height": 32, "icons": icons, "aliases": aliases},
        "info.json": {"license": {"spdx": "MIT"}},
        "chars.json": chars,
    }


def make_collection(folder: Path, **changes: Any) -> EmojiRecipe:
    """Writes labels and three small icon sets into a download cache, and returns a recipe of them."""
    names = ["waving-hand", "red-apple", "red-heart", "keycap-pound", "flag-cote-divoire"]
    codes = ["1f44b", "1f34e", "2764", "23-20e3", "1f1e8-1f1ee"]
    codes[3] = "0023-20e3"
    colours = ["#ffcc00", "#cc0000", "#ee1122", "#3355aa", "#33aa33"]
    sets = {
        "plain": {name: block(colour) for name, colour in zip(names, colours, strict=True)},
        "shifted": {name: block(colour, left=12) for name, colour in zip(names[:3], colours, strict=False)},
        "outline": {name: block(colour, left=8) for name, colour in zip(names, colours, strict=True)},
    }
    labels = make_package(folder, "labels@1.0.0", {"en/data.json": LABELS})
    styles: list[Style] = []
    for style, icons in sets.items():
        files = icon_files(icons, {}, dict(zip(codes, names, strict=True)) if style == "plain" else {})
        made = make_package(folder, f"@test/{style}@1.0.0", files)
        split = "held_out" if style == "outline" else "train"
        styles.append(Style(made.package, made.integrity, style, split))
    settings: dict[str, Any] = {
        "samples_per_shard": 10,
        "train_scenes": 20,
        "retrieval_scenes": 12,
        "image_size": 32,
        **changes,
    }
    return EmojiRecipe(labels=labels, styles=tuple(styles), **settings)


def write_toml(recipe: EmojiRecipe, path: Path) -> None:
    """Writes a recipe as the TOML that loads to it."""

    def lines(table: dict[str, Any]) -> list[str]:
        return [f"{key} = {json.dumps(value)}" for key, value in table.items() if not isinstance(value, dict | list)]

    table: dict[str, Any] = emoji.record(recipe)
    parts = [*lines(table), "[labels]", *lines(table["labels"])]
    for style in table["styles"]:
        parts += ["[[styles]]", *lines(style)]
    path.write_text("\n".join(parts))
    assert load(path) == recipe


def tree(folder: Path) -> dict[str, bytes]:
    """Returns every file but the lock."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def read_split(folder: Path) -> list[dict[str, bytes]]:
    found: list[dict[str, bytes]] = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            members = [(*member.name.split(".", 1), tar.extractfile(member)) for member in tar]
            for _, group in itertools.groupby(members, lambda entry: entry[0]):
                found.append({name: stream.read() for _, name, stream in group if stream is not None})
    return found


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A download cache for this test alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "shortclip" / "npm"


@pytest.fixture
def made(cache: Path, tmp_path: Path) -> tuple[EmojiRecipe, Path]:
    """A recipe and the folder that it was made into by one process."""
    recipe = make_collection(cache)
    emoji.make(recipe, tmp_path / "made", workers=1)
    return recipe, tmp_path / "made"


# Art: labels, matching, rendering


def test_labels_keep_order_and_drop_components(cache: Path) -> None:
    make_collection(cache)
    labels = read_labels(cache / "labels-1.0.0.tgz")
    assert [label.name for label in labels] == NAMES
    assert labels[1].tags == ("fruit", "red")
    assert labels[2].code == "2764"


def test_icons_are_found_by_code_by_name_and_by_another_sets_name(tmp_path: Path) -> None:
    chars = {"1f44b": "waving-hand", "1f34e": "apple", "2764-fe0f": "heart", "1f44b-1f3fb": "waving-hand-light"}
    first = {name: block("red") for name in ("waving-hand", "apple", "heart", "waving-hand-light", "keycap")}
    first["red-apple"] = {**block("red"), "hidden": True}
    second = {
        name: block("red") for name in ("cuore", "flag-for-cote-divoire", "waving-hand", "letter-a", "keycap-pound")
    }
    labels = make_package(tmp_path, "labels@1.0.0", {"en/data.json": LABELS})
    styles: list[Style] = []
    for style, files in {
        "one": icon_files(first, {"cuore": {"parent": "heart"}, "lost": {"parent": "nowhere"}}, chars),
        "two": icon_files(second, {}, {}),
    }.items():
        made = make_package(tmp_path, f"{style}@1.0.0", files)
        styles.append(Style(made.package, made.integrity, style, "train"))
    pictures = collect(labels, styles, [tmp_path / f"{name}-1.0.0.tgz" for name in ("labels", "one", "two")])
    assert [(picture.style, picture.name, picture.icon) for picture in pictures] == [
        ("one", "waving hand", "waving-hand"),
        ("one", "red apple", "apple"),
        ("one", "red heart", "heart"),
        ("two", "waving hand", "waving-hand"),
        ("two", "red heart", "cuore"),
        ("two", "keycap: #", "keycap-pound"),
        ("two", "flag: Côte d’Ivoire", "flag-for-cote-divoire"),  # noqa: RUF001
    ]
    apple = pictures[1]
    assert (apple.tags, apple.license, apple.package) == (("fruit", "red"), "MIT", "one@1.0.0")
    assert apple.url == "npm:one@1.0.0/icons.json#apple"


def test_a_name_of_two_meanings_is_not_used(tmp_path: Path) -> None:
    make_package(tmp_path, "labels@1.0.0", {"en/data.json": LABELS})
    icons = {"thing": block("red"), "red-heart": block("red")}
    sets: list[Any] = []
    for style, chars in {"one": {"1f44b": "thing"}, "two": {"1f34e": "thing"}, "three": {}}.items():
        made = make_package(tmp_path, f"{style}@1.0.0", icon_files(icons, {}, chars))
        sets.append(read_icons(tmp_path / f"{style}-1.0.0.tgz", Style(made.package, made.integrity, style, "train")))
    found = match(read_labels(tmp_path / "labels-1.0.0.tgz"), sets)
    assert [picture.name for picture in found if picture.style == "three"] == ["red heart"]


def test_aliases_are_mirrored_and_turned(tmp_path: Path) -> None:
    body = '<path fill="#ff0000" d="M0 0h16v8h-16z"/><path fill="#0000ff" d="M16 0h16v8h-16z"/>'
    moves = {"waving-hand": {"hFlip": True}, "red-heart": {"vFlip": True}, "keycap-pound": {"rotate": 1}}
    aliases = {name: {"parent": "red-apple", **move} for name, move in moves.items()}
    made = make_package(tmp_path, "one@1.0.0", icon_files({"red-apple": {"body": body}}, aliases, {}))
    make_package(tmp_path, "labels@1.0.0", {"en/data.json": LABELS})
    icons = read_icons(tmp_path / "one-1.0.0.tgz", Style(made.package, made.integrity, "one", "train"))
    pictures = {p.name: p for p in match(read_labels(tmp_path / "labels-1.0.0.tgz"), [icons])}
    drawn = {name: render(picture, 64)[..., :3] for name, picture in pictures.items()}
    assert drawn["red apple"].shape == (16, 64, 3)
    assert (drawn["red apple"][:, :31] == (255, 0, 0)).all()
    assert (drawn["waving hand"] == drawn["red apple"][:, ::-1]).all()
    assert (drawn["red heart"] == drawn["red apple"]).all()
    assert (drawn["keycap: #"] == drawn["red apple"].transpose(1, 0, 2)).all()


def test_other_packages_are_refused(tmp_path: Path) -> None:
    recipe = make_collection(tmp_path)
    tarballs = [tmp_path / f"{name}-1.0.0.tgz" for name in ("labels", "test-plain")]
    with pytest.raises(ValueError, match=r"has no en/data\.json"):
        collect(recipe.labels, recipe.styles[:1], tarballs[::-1])
    with pytest.raises(ValueError, match="must be an @iconify-json package"):
        collect(recipe.labels, recipe.styles[:1], [tarballs[0], tarballs[0]])
    make_package(tmp_path, "letters@1.0.0", icon_files({"letter-a": block("red")}, {}, {}))
    with pytest.raises(ValueError, match=r"no icon of @test/plain@1\.0\.0 bears a name of labels@1\.0\.0"):
        collect(recipe.labels, recipe.styles[:1], [tarballs[0], tmp_path / "letters-1.0.0.tgz"])


@pytest.mark.parametrize(
    ("body", "expected", "side", "shape"),
    [
        ('<rect x="3" y="5" width="20" height="10"/>', (3, 5, 23, 15), 60, (30, 60)),
        ('<rect x="30" y="50" width="10" height="40"/>', (30, 50, 40, 90), 60, (60, 15)),
        ('<circle cx="50" cy="50" r="20"/>', (30, 30, 70, 70), 33, (33, 33)),
        ('<rect width="100" height="1"/>', (0, 0, 100, 1), 20, (1, 20)),
    ],
)
def test_ink_is_cropped_to_itself_and_fills_the_side(
    body: str, expected: tuple[int, int, int, int], side: int, shape: tuple[int, int]
) -> None:
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 100 100">{body}</svg>'
    picture = Picture("flat", "x", (), "0", "x", "x@1.0.0", "MIT", svg)
    ink = render(picture, side)
    ink_side = max(expected[2] - expected[0], expected[3] - expected[1])
    assert max(ink.shape[:2]) == side
    # Ink is found to a 64th of the drawing, at either end.
    slack = 1 + 2 * side * (100 / 64) / ink_side
    bounds = ink_bounds(ink)
    assert bounds is not None
    assert abs(np.array([bounds[3] - bounds[1], bounds[2] - bounds[0]]) - shape).max() <= slack
    whole = render(picture, 100, trim=False)
    assert whole.shape == (100, 100, 4)
    assert ink_bounds(whole) == expected


def test_a_drawing_without_ink_is_named() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 8 8"></svg>'
    with pytest.raises(ValueError, match=r"npm:x@1\.0\.0/icons\.json#void draws nothing"):
        render(Picture("flat", "void", (), "0", "void", "x@1.0.0", "MIT", svg), 32)


# Packages


def install_npm(folder: Path, script: str) -> dict[str, str]:
    """Puts a program named npm on a PATH of its own: what it does is up to the test, the call is the real one."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{script}\n")
    (folder / "npm").chmod(0o755)
    return {"PATH": str(folder)}


def test_a_package_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(tmp_path / "registry", "@test/plain@1.0.0", {"info.json": {"a": 1}})
    source = tmp_path / "registry" / "test-plain-1.0.0.tgz"
    path = install_npm(tmp_path / "bin", f'echo "$@" >> {tmp_path}/calls; cp {source} .')
    monkeypatch.setenv("PATH", path["PATH"])
    cache = tmp_path / "cache"
    first = fetch(package, cache)
    assert first == fetch(package, cache) == cache / "test-plain-1.0.0.tgz"
    assert (tmp_path / "calls").read_text().startswith("pack @test/plain@1.0.0 ")
    assert (tmp_path / "calls").read_text().count("\n") == 1
    assert read_json(first, "info.json", "absent.json") == [{"a": 1}, None]
    first.write_bytes(first.read_bytes()[:50])
    assert fetch(package, cache).read_bytes() == source.read_bytes()
    assert [entry.name for entry in cache.iterdir()] == ["test-plain-1.0.0.tgz"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo other > x-1.0.0.tgz", r"x@1\.0\.0 arrived with checksum sha512-\S+, the recipe says sha512-"),
        ("true", r"npm pack x@1\.0\.0 left 0 tarballs"),
        (
            r'printf "npm warn old\nnpm error code E404\nnpm error 404 Not Found - GET http://x\n" >&2; exit 1',
            r"npm pack x@1\.0\.0 failed \(404 Not Found - GET http://x\); check the network",
        ),
        ("exit 7", r"npm pack x@1\.0\.0 failed \(no message\)"),
    ],
)
def test_what_npm_gets_wrong_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, said: str
) -> None:
    package = make_package(tmp_path / "registry", "x@1.0.0", {})
    monkeypatch.setenv("PATH", install_npm(tmp_path / "bin", script)["PATH"])
    with pytest.raises(ValueError, match=said) as caught:
        fetch(package, tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "cache").iterdir()) == []


# The splits


def test_splits_keep_the_held_out_style_apart(cache: Path) -> None:
    recipe = make_collection(cache, singles_per_picture=2)
    tarballs = fetch_all([recipe.labels, *recipe.styles], cache)
    splits = emoji.plan_splits(recipe, collect(recipe.labels, recipe.styles, tarballs))
    styles = {
        split: {placed.picture.style for scene in scenes for placed in scene.placed} for split, scenes in splits.items()
    }
    assert styles == {"train": {"plain", "shifted"}, "zero_shot": {"outline"}, "retrieval": {"outline"}}
    assert all(len({placed.picture.style for placed in scene.placed}) == 1 for scene in splits["train"])
    singles = Counter(
        (scene.placed[0].picture.style, scene.caption) for scene in splits["train"] if not scene.placed[0].place
    )
    assert singles == {("plain", n): 2 for n in NAMES} | {("shifted", n): 2 for n in NAMES[:3]}
    assert len(splits["train"]) == 2 * 8 + 20
    assert [(scene.class_id, scene.caption) for scene in splits["zero_shot"]] == list(enumerate(NAMES))
    captions = [scene.caption for scene in splits["retrieval"]]
    assert len(set(captions)) == len(captions) == 12


def test_the_seed_decides_everything(cache: Path) -> None:
    recipe = make_collection(cache)
    pictures = collect(recipe.labels, recipe.styles, fetch_all([recipe.labels, *recipe.styles], cache))
    plans = emoji.plan_splits(recipe, pictures)
    assert emoji.plan_splits(recipe, pictures) == plans
    other = emoji.plan_splits(replace(recipe, seed=1), pictures)
    assert other["train"] != plans["train"]
    assert other["retrieval"] != plans["retrieval"]
    assert other["zero_shot"] == plans["zero_shot"]
    # One sample's choices do not depend on how many others there are.
    more = emoji.plan_splits(replace(recipe, retrieval_scenes=13), pictures)
    assert more["retrieval"][:12] == plans["retrieval"]


def test_grouped_scenes_of_some_names_and_a_set_of_seen_styles(cache: Path) -> None:
    plain = make_collection(cache)
    recipe = replace(plain, scenes="grouped", names=("red apple", "red heart"), seen_retrieval_scenes=15)
    pictures = collect(recipe.labels, recipe.styles, fetch_all([recipe.labels, *recipe.styles], cache))
    splits = emoji.plan_splits(recipe, pictures)
    assert {split: len(scenes) for split, scenes in splits.items()} == {
        "train": 4 + 20,
        "zero_shot": 2,
        "retrieval": 12,
        "retrieval_seen": 15,
    }
    for split, scenes in splits.items():
        placed = [item.picture for scene in scenes for item in scene.placed]
        assert {picture.name for picture in placed} == {"red apple", "red heart"}
        styles = {"plain", "shifted"} if split in ("train", "retrieval_seen") else {"outline"}
        assert {picture.style for picture in placed} <= styles
    assert len({scene.caption for scene in splits["retrieval_seen"]}) == 15
    with pytest.raises(ValueError, match='names: no picture is called "aple"'):
        emoji.plan_splits(replace(recipe, names=("red apple", "aple")), pictures)


def test_a_folder_made_before_there_were_grouped_scenes_is_still_known(made: tuple[EmojiRecipe, Path]) -> None:
    recipe, out = made
    kept = json.loads((out / "recipe.json").read_text())
    assert not {"scenes", "names", "seen_retrieval_scenes"} & kept.keys()
    before = tree(out)
    emoji.make(recipe, out, workers=1)
    assert tree(out) == before
    with pytest.raises(ValueError, match=r"was made by another recipe: .*names"):
        emoji.make(replace(recipe, names=("red apple",)), out, workers=1)


# The folder


def test_a_folder_holds_what_the_readme_says(made: tuple[EmojiRecipe, Path]) -> None:
    recipe, out = made
    summary = json.loads((out / "summary.json").read_text())
    assert {split: entry["samples"] for split, entry in summary["splits"].items()} == {
        "train": 28,
        "zero_shot": 5,
        "retrieval": 12,
    }
    assert summary["classes"] == 5
    assert (out / "zero_shot" / "classnames.txt").read_text().splitlines() == NAMES
    assert (out / "zero_shot" / "zeroshot_classification_templates.txt").read_text() == "{c}\n"
    for split, entry in summary["splits"].items():
        samples = read_split(out / split)
        assert len(samples) == entry["samples"]
        rows = [row for path in sorted((out / split).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
        for sample, row in zip(samples, rows, strict=True):
            check_sample(sample, row, split, recipe)


def check_sample(sample: dict[str, bytes], row: dict[str, Any], split: str, recipe: EmojiRecipe) -> None:
    details = json.loads(sample["json"])
    assert simplejpeg.decode_jpeg(sample["jpg"]).shape == (recipe.image_size, recipe.image_size, 3)
    assert hashlib.sha256(sample["jpg"]).hexdigest() == row["sha256"] == details["sha256"]
    assert sample["txt"].decode() == row["caption"] == details["captions"][0]
    assert (row["license"], row["status"]) == ("MIT", "success")
    assert re.fullmatch(r"(npm:@test/\w+@1\.0\.0/icons\.json#[\w-]+ ?)+", row["url"])
    assert details["source"] == f"@test/{row['style']}@1.0.0"
    assert all(item["name"] in NAMES and len(item["box"]) == 4 for item in details["objects"])
    assert ("cls" in sample) == (split == "zero_shot")
    if split == "zero_shot":
        assert NAMES[int(sample["cls"])] == row["caption"] == row["name"]
    tags = [" ".join(entry["tags"]) for entry in LABELS if entry["label"] == row["name"] and "tags" in entry]
    assert ("tags.txt" in sample) == bool(split == "train" and tags)
    if row["name"] is None:
        assert all({"size", "place"} <= item.keys() for item in details["objects"])
    else:
        assert details["hexcode"] == details["objects"][0]["hexcode"]


def test_a_finished_folder_is_left_alone_and_a_lost_shard_is_made_again(
    made: tuple[EmojiRecipe, Path], cache: Path
) -> None:
    recipe, out = made
    whole = tree(out)
    (out / "train" / "00001.parquet").unlink()
    emoji.make(recipe, out, workers=2)
    assert tree(out) == whole
    shutil.rmtree(cache)
    emoji.make(recipe, out, workers=2)
    assert tree(out) == whole


def test_two_workers_write_the_same_bytes(made: tuple[EmojiRecipe, Path], tmp_path: Path) -> None:
    recipe, out = made
    emoji.make(recipe, tmp_path / "other", workers=2)
    assert tree(tmp_path / "other") == tree(out)


def test_other_data_in_the_folder_is_refused(made: tuple[EmojiRecipe, Path], tmp_path: Path) -> None:
    recipe, out = made
    whole = tree(out)
    with pytest.raises(ValueError, match="made was made by another recipe: seed is 0 there and 3 here; choose another"):
        emoji.make(replace(recipe, seed=3), out, workers=1)
    assert tree(out) == whole
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "00000.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"photos holds other files \(00000\.tar, \.\.\.\) and no recipe\.json"):
        emoji.make(recipe, tmp_path / "photos", workers=1)


# The command


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "ingest.py"), *map(str, arguments)]


def test_without_npm_the_command_says_what_to_install(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_toml(make_collection(tmp_path / "elsewhere"), tmp_path / "recipe.toml")
    environment = {**os.environ, "PATH": str(tmp_path / "empty"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    call = command(tmp_path / "recipe.toml", "--out", tmp_path / "out")
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: npm is not on PATH: install Node.js")
    assert done.stderr.count("\n") == 1


def test_a_killed_command_continues_to_the_same_bytes(cache: Path, tmp_path: Path) -> None:
    recipe = make_collection(cache, train_scenes=800, samples_per_shard=8)
    write_toml(recipe, tmp_path / "recipe.toml")
    out = tmp_path / "out"
    call = command(tmp_path / "recipe.toml", "--out", out, "--workers", "2")
    with subprocess.Popen(call, stderr=subprocess.DEVNULL) as process:
        assert eventually(lambda: list(out.glob("train/*.parquet")))
        workers = children(process.pid)
        process.send_signal(signal.SIGKILL)
    assert eventually(lambda: not any(map(process_stat, workers))), "workers outlived the run"
    assert 1 <= len(list(out.glob("train/*.parquet"))) < 101
    assert not (out / "summary.json").exists()
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{out}/train: 808 pairs in 101 shards" in done.stdout
    emoji.make(recipe, tmp_path / "whole", workers=2)
    assert tree(out) == tree(tmp_path / "whole")


@pytest.mark.parametrize("whole_group", [False, True], ids=["the command", "its workers too"])
def test_sigterm_ends_the_command_with_one_line_and_it_continues(
    cache: Path, tmp_path: Path, whole_group: bool
) -> None:
    recipe = make_collection(cache, train_scenes=240, samples_per_shard=8)
    write_toml(recipe, tmp_path / "recipe.toml")
    out = tmp_path / "out"
    call = command(tmp_path / "recipe.toml", "--out", out, "--workers", "2")
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert eventually(lambda: list(out.glob("train/*.parquet")))
        workers = children(process.pid)
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
        said = process.communicate()[1].splitlines()
    assert process.returncode == 130
    assert not (out / "summary.json").exists()
    # The lines before it are the progress bar's.
    assert said[-1] == "interrupted; run the same command to continue"
    assert all("pictures" in line for line in said[:-1] if line)
    assert eventually(lambda: not any(map(process_stat, workers))), "workers outlived the run"
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (out / "summary.json").exists()


def children(pid: int) -> list[int]:
    return [int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()]


@pytest.mark.slow
def test_the_real_packages_have_the_art() -> None:
    recipe = load(ROOT / "datasets" / "emoji.toml")
    try:
        tarballs = fetch_all([recipe.labels, *recipe.styles], cache_dir())
    except ValueError as error:
        pytest.skip(str(error))
    pictures = collect(recipe.labels, recipe.styles, tarballs)
    names = {style.style: {p.name for p in pictures if p.style == style.style} for style in recipe.styles}
    assert len(names["openmoji"]) == 1914
    assert all(len(names[style.style]) > 1200 for style in recipe.styles)
    trained = set().union(*(names[style.style] for style in recipe.styles if style.split == "train"))
    assert names["openmoji"] <= trained
    assert len(set(map(id, pictures))) == len({(p.style, p.icon) for p in pictures})
    for picture in pictures:
        assert render(picture, 16)[..., 3].max() > 16
