"""validate.py measures what open_clip and clip_benchmark measure on the same weights and pictures: `make test-interop`.

Both run in .venv-peers, in a process of its own; clip_benchmark is unpacked beside it, not installed.
"""

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import unpacked_wheel
from PIL import Image
from random_run import make_run

import export
import validate
from evaluation.imagenet import imagenet_classes, imagenet_wnids, search_path
from model.presets import model_config
from pipeline.stills import Preprocess, Still, decode_still
from training.layouts import Source, open_held_out

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".venv-peers" / "bin" / "python"
ATOL = 1e-5
GRID, TEXT_TOKENS = 4, 20
TEMPLATES = ["a photo of a {c}.", "{c}, sketched"]
FORMS = ("JPEG", "PNG", "WEBP")

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(not PEER.exists(), reason="`make peers` makes .venv-peers, which has open_clip"),
]


@pytest.fixture(scope="session")
def clip_benchmark() -> Path:
    """The unpacked wheel of clip_benchmark 1.6.2, downloaded once into .cache. Tests only read it."""
    return unpacked_wheel("clip_benchmark", "1.6.2", "clip_benchmark's retrieval code cannot be had")


def peer(*arguments: object, path: Path | None = None) -> None:
    """Runs a command of peer_evaluation.py where nothing can be downloaded."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    command = [str(PEER), str(ROOT / "tests" / "peer_evaluation.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module", params=["ViT-B-16-bpe", "ViT-B-16"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, clip_vocabulary: Path) -> Path:
    """A run with random weights, one layer deep, and its export in the folder `exported`."""
    config = model_config(request.param)
    towers = (dataclasses.replace(tower, layers=1) for tower in (config.image, config.text))
    config = dataclasses.replace(config, **dict(zip(("image", "text"), towers, strict=True)))
    folder = tmp_path_factory.mktemp("interop") / "run"
    make_run(folder, config, GRID, TEXT_TOKENS)
    recorded = json.loads((folder / "config.json").read_text())
    recorded |= {"tokens": GRID**2, "image_reduction": "resize", "text_tokens": TEXT_TOKENS}
    if config.text.tokenizer == "bpe":
        recorded["vocabulary"] = str(clip_vocabulary)
    (folder / "config.json").write_text(json.dumps(recorded))
    assert export.main([str(folder), "--out", str(folder.parent / "exported" / "model.safetensors")]) == 0
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, photographs: list[npt.NDArray[np.uint8]]) -> list[Path]:
    """45 crops of photographs of all shapes, grey ones among them, in three formats."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths: list[Path] = []
    for i in range(45):
        whole = photographs[i % len(photographs)]
        height, width = (int(side * rng.uniform(0.2, 1)) for side in whole.shape[:2])
        top, left = rng.integers(whole.shape[0] - height), rng.integers(whole.shape[1] - width)
        image = Image.fromarray(whole[top : top + height, left : left + width])
        form = FORMS[i % 3]
        paths.append(folder / f"{i:02d}.{form.lower()}")
        (image.convert("L") if i % 7 == 3 else image).save(paths[-1], form)
    return paths


def theirs(command: str, run: Path, file: Path, path: Path | None = None, **values: Any) -> Any:
    file.write_text(json.dumps(values))
    peer(command, run.parent / "exported", file, path=path)
    return np.load(f"{file}.npz")


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert validate.main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def difference(name: str, ours: Any, their: npt.NDArray[np.float32]) -> None:
    found = float(np.abs(np.asarray(ours) - their).max())
    print(f"{name}: max abs difference {found:.1e}")
    assert found < ATOL, f"{name}: {found}"


def test_class_names_and_templates_are_open_clips(tmp_path: Path) -> None:
    peer("metadata", tmp_path / "metadata.json")
    expected = json.loads((tmp_path / "metadata.json").read_text())
    found = imagenet_classes(search_path())
    assert [list(found.names), list(found.templates)] == [expected["names"], expected["templates"]]
    wnids = imagenet_wnids(search_path())
    assert (len(wnids), wnids) == (1000, sorted(wnids))


CASES = [("numbers", "squash", "bilinear"), ("wnids", "shorter", "bicubic")]


@pytest.mark.parametrize(("layout", "resize", "interpolation"), CASES, ids=[case[0] for case in CASES])
def test_zero_shot_is_open_clips(
    run: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, resize: Any,
    interpolation: Any,
) -> None:  # fmt: skip
    """All 1000 classes in numbered folders, and every fifth by its wnid; pictures at all places of the ranking."""
    names = imagenet_classes(search_path()).names
    folders = [str(i) for i in range(1000)]
    if layout == "wnids":
        names, folders = names[::5], imagenet_wnids(search_path())[::5]
    expected = theirs(
        "zero_shot", run, tmp_path / "inputs.json", resize=resize, interpolation=interpolation, names=list(names),
        templates=TEMPLATES, pictures=[str(path) for path in pictures], places=[i % 9 for i in range(len(pictures))],
    )  # fmt: skip
    data = tmp_path / "data"
    for folder in folders:
        (data / folder).mkdir(parents=True)
    for path, label in zip(pictures, expected["labels"], strict=True):
        (data / folders[label] / path.name).symlink_to(path)
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps({"templates": TEMPLATES}))
    flags = ("--classes", classes, "--resize", resize, "--interpolation", interpolation)
    found = measured(capsys, run, "--data", data, *flags)
    assert (found["num_classes"], found["num_images"], found["num_bad"]) == (len(names), len(pictures), 0)
    ours = (found["zero_shot_top1"], found["zero_shot_top5"])
    print(f"{layout}, {resize}: top-1, top-5 {ours} here, {expected['top1']}, {expected['top5']} in open_clip")
    assert ours == (pytest.approx(expected["top1"], abs=1e-12), pytest.approx(expected["top5"], abs=1e-12))
    assert 0 < ours[0] < ours[1] < 1

    model, settings, _ = validate.load_run(run, validate.Validate(run, str(data)))
    mean, std = (np.array(each)[:, None, None] for each in (model.config.pixel_mean, model.config.pixel_std))
    squares = np.rint((expected["images"] * std + mean) * 255).transpose(0, 2, 3, 1)
    for path, square in zip(pictures, squares, strict=True):
        ours = decode_still(Still(path), Preprocess(resize, interpolation), 16 * GRID)
        np.testing.assert_array_equal(ours, square, err_msg=path.name)
    source = Source(data, classes=classes, preprocess=Preprocess(resize, interpolation))
    held_out, _ = open_held_out(source, settings)
    if layout == "wnids":  # once is enough of what takes longest
        difference("classes", held_out.class_features(model), expected["classes"])
    paths = [still.path.name for still in held_out.stills]  # type: ignore[attr-defined]
    order = [paths.index(path.name) for path in pictures]
    difference("images", held_out.image_features(model).features[order], expected["features"])


@pytest.mark.parametrize(("resize", "interpolation"), [("squash", "bicubic"), ("shorter", "bilinear")])
def test_retrieval_is_clip_benchmarks(
    run: Path, pictures: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], clip_benchmark: Path,
    resize: Any, interpolation: Any,
) -> None:  # fmt: skip
    rng = np.random.default_rng(1)
    names = imagenet_classes(search_path()).names
    captions = [[f"a {' and a '.join(rng.choice(names, 3))}" for _ in range(rng.integers(1, 7))] for _ in pictures]
    expected = theirs(
        "retrieval", run, tmp_path / "inputs.json", clip_benchmark, resize=resize, interpolation=interpolation,
        pictures=[str(path) for path in pictures], captions=captions,
    )  # fmt: skip
    images = [
        {"filename": path.name, "split": "test", "sentences": [{"raw": text} for text in texts]}
        for path, texts in zip(pictures, captions, strict=True)
    ]
    first = [{**image, "sentences": image["sentences"][:1]} for image in images]
    flags = ("--data", pictures[0].parent, "--resize", resize, "--interpolation", interpolation)
    for prefix, entries in (("", images), ("first_", first)):
        (tmp_path / "dataset.json").write_text(json.dumps({"images": entries}))
        found = measured(capsys, run, *flags, "--captions", tmp_path / "dataset.json")
        for side in ("image", "text"):
            ours = [found[f"retrieval_{side}_r{k}"] for k in (1, 5, 10)]
            print(f"{resize} {prefix}{side}: R@1, 5, 10 {ours} here, {expected[prefix + side].tolist()} there")
            assert ours == pytest.approx(expected[prefix + side].tolist(), abs=1e-6)
            assert 0 < ours[-1] < 1
    model, settings, _ = validate.load_run(run, validate.Validate(run, str(tmp_path)))
    source = Source(
        pictures[0].parent, captions=tmp_path / "dataset.json", preprocess=Preprocess(resize, interpolation)
    )
    held_out, _ = open_held_out(source, settings)
    difference("images", held_out.image_features(model).features, expected["features"])
    texts = [text.encode() for each in captions for text in each]
    difference("captions", held_out.text_features(model, texts), expected["texts"])
