"""validate.py whole, on small real sets in every layout: the same pictures give the same numbers in each."""

import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from conftest import png, write_tar
from PIL import Image
from random_run import make_run

import validate
from evaluation.classes import prompts
from evaluation.folders import OBJECTNET_FILES
from evaluation.zero_shot import class_weights
from model.clip import CLIP
from model.presets import model_config
from pipeline.captions import caption_encoder
from pipeline.tokens import patchify

NAMES = ["cat", "cup of coffee", "rocket", "astronaut", "galaxy"]
TEMPLATES = ["a photo of a {c}.", "the {c}"]
WNIDS = [f"n{i:08d}" for i in (3, 14, 15, 92, 653)]
NUM_PICTURES = 20
SIDE = 64


def make(folder: Path) -> CLIP:
    """Writes a run that validate.py reads: random weights, a grid of 4 x 4."""
    model = make_run(folder, replace(model_config("ViT-Ti-16"), name="ViT-Ti-16"), 4, 12)
    recorded = json.loads((folder / "config.json").read_text())
    more = {"tokens": 16, "image_reduction": "resize", "text_tokens": 12}
    (folder / "config.json").write_text(json.dumps(recorded | more))
    return model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP]:
    folder = tmp_path_factory.mktemp("validate") / "run"
    return folder, make(folder)


@pytest.fixture(scope="module")
def labels() -> list[int]:
    return np.random.default_rng(5).integers(len(NAMES), size=NUM_PICTURES).tolist()


@pytest.fixture(scope="module")
def jpegs(photo_jpegs: list[bytes]) -> list[bytes]:
    return photo_jpegs[:NUM_PICTURES]


@pytest.fixture(scope="module")
def expected(run: tuple[Path, CLIP], jpegs: list[bytes], labels: list[int]) -> npt.NDArray[np.bool_]:
    """[pictures, classes]: whether a class is not below the picture's own, the plain way; see `shares`."""
    model = run[1]
    squares = [
        Image.open(io.BytesIO(jpeg)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for jpeg in jpegs
    ]
    patches = torch.from_numpy(patchify(np.stack([np.asarray(square) for square in squares]), 16))
    positions = torch.arange(16, dtype=torch.int16).repeat(len(jpegs), 1)
    texts = [text.encode() for text in prompts(NAMES, TEMPLATES)]
    with torch.no_grad():
        images = model.encode_image(patches, positions)
        ids = torch.from_numpy(caption_encoder("wordpiece", 12).encode(texts))
        classes = class_weights(model.encode_text(ids), len(NAMES))
    scores = (images @ classes.T).numpy()
    own = scores[np.arange(len(labels)), labels]
    assert np.abs(np.sort(scores, axis=1)[:, 1:] - np.sort(scores, axis=1)[:, :-1]).min() > 1e-5, "ties"
    return scores >= own[:, None]


def shares(expected: npt.NDArray[np.bool_], rows: Sequence[int], classes: Sequence[int]) -> dict[str, float]:
    """Returns the accuracies over some pictures, among some classes."""
    places = expected[np.ix_(rows, classes)].sum(axis=1)
    return {f"zero_shot_top{k}": float((places <= k).mean()) for k in (1, 5)}


def measured(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert validate.main([*map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert validate.main([*map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def accuracies(results: dict[str, Any]) -> dict[str, float]:
    return {name: results[name] for name in ("zero_shot_top1", "zero_shot_top5")}


def class_file(folder: Path, **values: Any) -> Path:
    file = folder / "classes.json"
    file.write_text(json.dumps(values))
    return file


def fill(root: Path, folders: Sequence[str | None], jpegs: Sequence[bytes], labels: Sequence[int]) -> Path:
    """Writes each picture into the folder of its class; None: that class has none."""
    for i, (jpeg, label) in enumerate(zip(jpegs, labels, strict=True)):
        if (name := folders[label]) is not None:
            (root / name).mkdir(parents=True, exist_ok=True)
            (root / name / f"{i:05d}.JPEG").write_bytes(jpeg)
    return root


def test_every_layout_gives_the_same_numbers(
    run: tuple[Path, CLIP], jpegs: list[bytes], labels: list[int], expected: npt.NDArray[np.bool_], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    everything = shares(expected, range(NUM_PICTURES), range(len(NAMES)))
    assert 0 < everything["zero_shot_top1"] < 1
    given = ("--classes", class_file(tmp_path, names=NAMES, templates=TEMPLATES))
    order = tmp_path / "wnids.txt"
    order.write_text("\n".join(WNIDS))
    wnids, numbers, named = (tmp_path / name for name in ("val", "v2", "named"))
    fill(wnids, WNIDS, jpegs, labels)
    fill(numbers, list(map(str, range(5))), jpegs, labels)
    fill(named, [name.replace(" ", "_") for name in NAMES], jpegs, labels)
    (named / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    webdataset, shards = tmp_path / "wds", tmp_path / "shards"
    samples = [
        {"__key__": f"s{i:07d}", "jpg": jpeg, "cls": str(label).encode(), "txt": b"a picture"}
        for i, (jpeg, label) in enumerate(zip(jpegs, labels, strict=True))
    ]
    write_tar(webdataset / "test" / "0.tar", [{k: v for k, v in s.items() if k != "txt"} for s in samples[:12]])
    write_tar(webdataset / "test" / "1.tar", [{k: v for k, v in s.items() if k != "txt"} for s in samples[12:]])
    write_tar(shards / "00000.tar", samples)
    for folder in (webdataset, shards):
        (folder / "classnames.txt").write_text("\n".join(NAMES))
        (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))

    commands: dict[str, tuple[object, ...]] = {
        "class folders: wnids": ("--data", wnids, *given, "--wnids", order),
        "class folders: numbers": ("--data", numbers, *given),
        "class folders: names": ("--data", named),
        "webdataset": ("--data", webdataset),
        "shards": ("--data", shards, "--resize", "squash"),
    }
    for layout, command in commands.items():
        found = measured(capsys, run[0], *command)
        assert accuracies(found) == everything, layout
        assert found["layout"] == layout
        assert (found["num_images"], found["num_bad"]) == (NUM_PICTURES, 0)
        assert (found["num_classes"], found["num_templates"]) == (5, 2)
        assert found["preprocessing"] == {
            "resize": "squash", "interpolation": "bilinear", "image_size": SIDE, "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225], "decoder": "pillow",
        }  # fmt: skip
    as_trained = measured(capsys, run[0], "--data", shards)
    assert as_trained["preprocessing"]["decoder"] == "turbo"
    assert as_trained["num_rejected"] == 0


@pytest.mark.parametrize("kind", ["wnids", "ObjectNet", "names"])
def test_a_subset_is_scored_among_its_own_classes(
    run: tuple[Path, CLIP], jpegs: list[bytes], labels: list[int], expected: npt.NDArray[np.bool_], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], kind: str,
) -> None:  # fmt: skip
    subset = [0, 3, 4]
    rows = [i for i, label in enumerate(labels) if label in subset]
    root, more = tmp_path / "root", tuple[object, ...]()
    if kind == "wnids":
        fill(root, [wnid if i in subset else None for i, wnid in enumerate(WNIDS)], jpegs, labels)
        order = tmp_path / "order"
        order.write_text("\n".join(WNIDS))
        more = ("--wnids", order, "--classes", class_file(tmp_path, names=NAMES, templates=TEMPLATES))
    else:
        fill(root, [name.replace(" ", "-") for name in NAMES], jpegs, labels)
        label_of = {name.replace(" ", "-"): name.title() for name in NAMES}
        (tmp_path / "mappings").mkdir()
        overlap = {NAMES[i].title(): "something" for i in subset}
        for name, values in zip(OBJECTNET_FILES, (label_of, overlap), strict=True):
            (tmp_path / "mappings" / name).write_text(json.dumps(values))
        values: dict[str, Any] = {"templates": TEMPLATES}
        if kind == "names":
            values["names"] = {NAMES[i].replace(" ", "-"): NAMES[i] for i in subset}
        more = ("--classes", class_file(tmp_path, **values))
    found = measured(capsys, run[0], "--data", root, *more)
    assert found["layout"] == f"class folders: {kind}"
    assert (found["num_classes"], found["num_images"]) == (3, len(rows))
    assert accuracies(found) == shares(expected, rows, subset)
    assert accuracies(found) != shares(expected, rows, range(5))


def test_unreadable_pictures_are_counted_and_named(
    run: tuple[Path, CLIP], jpegs: list[bytes], labels: list[int], expected: npt.NDArray[np.bool_], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    bad = {1: b"", 7: jpegs[7][: len(jpegs[7]) // 2], 12: b"<html>"}
    broken = [bad.get(i, jpeg) for i, jpeg in enumerate(jpegs)]
    root = fill(tmp_path / "named", NAMES, broken, labels)
    (root / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    assert validate.main([str(run[0]), "--data", str(root)]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])
    assert (found["num_images"], found["num_bad"], found["num_missing"]) == (NUM_PICTURES - 3, 3, 0)
    assert sorted(found["bad"]) == sorted(
        f"{root / NAMES[labels[i]] / f'{i:05d}.JPEG'}: {reason}"
        for i, reason in ((1, "empty image"), (7, "damaged image data"), (12, "not an image"))
    )
    assert sorted(err.splitlines()) == [f"left out: {line}" for line in sorted(found["bad"])]
    assert accuracies(found) == shares(expected, [i for i in range(NUM_PICTURES) if i not in bad], range(5))
    for path in root.rglob("*.JPEG"):
        path.write_bytes(b"none")
    assert validate.main([str(run[0]), "--data", str(root)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("none of its 20 pictures could be read")


def test_the_preprocessing_that_is_asked_for_is_done_and_recorded(
    run: tuple[Path, CLIP], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The picture's left and right are red: squashed they are seen, in the middle they are not.
    wide = np.zeros((64, 256, 3), np.uint8)
    wide[:, :96] = wide[:, 160:] = (255, 0, 0)
    for name, pixels in (("wide", wide), ("middle", wide[:, 96:160])):
        (tmp_path / "set" / name).mkdir(parents=True)
        (tmp_path / "set" / name / "0.png").write_bytes(png(pixels))
    file = tmp_path / "dataset.json"
    images = [
        {"filename": f"{name}/0.png", "split": "test", "sentences": [{"raw": name}]} for name in ("wide", "middle")
    ]
    file.write_text(json.dumps({"images": images}))
    found: dict[tuple[str, str], float] = {}
    for resize in ("squash", "shorter"):
        for interpolation in ("bilinear", "bicubic"):
            flags = ("--resize", resize, "--interpolation", interpolation)
            results = measured(capsys, run[0], "--data", tmp_path / "set", "--captions", file, *flags)
            recorded = results["preprocessing"]
            assert (recorded["resize"], recorded["interpolation"]) == (resize, interpolation)
            found[resize, interpolation] = results["retrieval_image_r1"]
    # In the middle both are the same picture, and what cannot be told apart is wrong.
    assert found["shorter", "bilinear"] == found["shorter", "bicubic"] == 0
    assert min(found["squash", "bilinear"], found["squash", "bicubic"]) > 0


def test_retrieval_by_karpathys_captions(
    run: tuple[Path, CLIP], jpegs: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several captions an image; a missing picture takes its captions along."""
    pictures = tmp_path / "pictures"
    words = np.random.default_rng(3)
    vocabulary = ["a", "the", "red", "blue", "old", "cat", "cup", "star", "man", "on", "in", "of", "sky"]
    texts = [[" ".join(words.choice(vocabulary, 6)) for _ in range(words.integers(1, 7))] for _ in jpegs]
    images = [
        {
            "filename": f"{i}.jpg",
            "filepath": "val2014" if i % 2 else "",
            "split": "test",
            "sentences": [{"raw": text} for text in each],
        }
        for i, each in enumerate(texts)
    ]
    for i, jpeg in enumerate(jpegs):
        path = pictures / ("val2014" if i % 2 else "") / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg)
    file = tmp_path / "dataset_coco.json"
    command = (run[0], "--data", pictures, "--captions", file, "--split", "test")
    file.write_text(json.dumps({"images": [*images, {**images[0], "filename": "gone.jpg"}], "dataset": "coco"}))
    found = measured(capsys, *command)
    assert validate.main([*map(str, command)]) == 0
    assert f"left out: {pictures / 'gone.jpg'}: no such file" in capsys.readouterr().err
    assert (found["num_images"], found["num_bad"], found["num_missing"]) == (NUM_PICTURES, 1, 1)
    assert found["num_captions"] == sum(map(len, texts))
    assert found["layout"] == "captions: test"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    whole = measured(capsys, *command)
    keys = [f"retrieval_{side}_r{k}" for side in ("image", "text") for k in (1, 5, 10)]
    assert [whole[key] for key in keys] == [found[key] for key in keys]
    # The same as a webdataset folder whose txt holds a caption a line.
    samples = [{"__key__": str(i), "jpg": jpeg, "txt": "\n".join(texts[i]).encode()} for i, jpeg in enumerate(jpegs)]
    write_tar(tmp_path / "wds" / "test" / "0.tar", samples)
    (tmp_path / "wds" / "dataset_type.txt").write_text("retrieval\n")
    again = measured(capsys, run[0], "--data", tmp_path / "wds")
    assert [again[key] for key in keys] == [whole[key] for key in keys]
    assert again["num_captions"] == whole["num_captions"]
    assert 0 < whole["retrieval_text_r10"] <= 1


def test_captions_that_pictures_share_are_counted_with_what_they_cost(
    run: tuple[Path, CLIP], jpegs: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = ["a cat", "a cat", "a cat", "a dog", "a dog", *(f"picture {i}" for i in range(5))]
    samples = [{"__key__": str(i), "jpg": jpegs[i], "txt": text.encode()} for i, text in enumerate(texts)]
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    write_tar(tmp_path / "alone" / "00000.tar", samples[4:])
    assert validate.main([str(run[0]), "--data", str(tmp_path / "shards")]) == 0
    *table, results = capsys.readouterr().out.splitlines()
    found = json.loads(results)
    assert (found["num_shared_captions"], found["num_captions"]) == (5, 10)
    assert (found["retrieval_image_r1_limit"], found["retrieval_text_r1_limit"]) == (0.7, 0.5)
    assert [line.split()[-1] for line in table if line.startswith("so at most")] == ["70.00%", "50.00%"]
    assert any(line.startswith("captions that another picture has too") for line in table)
    assert validate.main([str(run[0]), "--data", str(tmp_path / "alone")]) == 0
    out = capsys.readouterr().out
    assert json.loads(out.splitlines()[-1])["num_shared_captions"] == 0
    assert "so at most" not in out


def test_of_a_run_with_stages_the_last_finished_one_is_measured(
    run: tuple[Path, CLIP], jpegs: list[bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = tmp_path / "run"
    for name, init, steps in (("pretrain", None, 1), ("finetune", "pretrain", 1), ("longer", "finetune", 2)):
        shutil.copytree(run[0], whole / name)
        recorded = json.loads((whole / name / "config.json").read_text())
        stage = {"init": init and str(whole / init), "steps": steps}
        (whole / name / "config.json").write_text(json.dumps(recorded | stage))
    samples = [{"__key__": str(i), "jpg": jpegs[i], "txt": b"picture %d" % i} for i in range(4)]
    write_tar(tmp_path / "shards" / "00000.tar", samples)
    assert validate.main([str(whole), "--data", str(tmp_path / "shards")]) == 0
    said = capsys.readouterr()
    assert f"{whole} holds the stages pretrain, finetune, longer: this is finetune, the last finished one" in said.err
    assert json.loads(said.out.splitlines()[-1])["run"] == str(whole / "finetune")


def test_the_report_draws_pictures_of_any_format(
    run: tuple[Path, CLIP], jpegs: list[bytes], labels: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "samples_seen": 64, "loss": 4.0}) + "\n")
    root = fill(tmp_path / "named", NAMES, jpegs, labels)
    for path in sorted(root.rglob("*.JPEG"))[::2]:
        with Image.open(path) as picture:
            picture.save(path.with_suffix(".webp"))
        path.unlink()
    report = tmp_path / "report.png"
    found = measured(capsys, folder, "--data", root, "--report", report)
    assert found["report"] == str(report)
    assert report.stat().st_size > 10_000


def test_what_does_not_fit_is_refused_in_one_line(
    run: tuple[Path, CLIP], jpegs: list[bytes], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = fill(tmp_path / "outer" / "named", NAMES[:2], jpegs[:2], [0, 1])
    classes, missing = class_file(tmp_path, names=["a"]), tmp_path / "none"
    by_folder = tmp_path / "by_folder.json"
    by_folder.write_text('{"names": {"a": "b"}}')
    wds = tmp_path / "wds"
    write_tar(wds / "val" / "0.tar", [{"__key__": "a", "jpg": jpegs[0], "cls": b"3"}])
    cases: list[tuple[tuple[object, ...], str]] = [
        (("--data", missing), f"--data {missing}: no such folder"),
        (("--data", tmp_path / "outer"), "its folder " + str(named) + " has class folders; give that"),
        (
            ("--data", named / NAMES[0]),
            "its pictures have no class; of pictures with captions make shards (python ingest.py folder",
        ),
        (("--data", wds), "--split val for webdataset's layout"),
        (("--data", wds, "--split", "val"), "its samples have no captions, and there is no classnames.txt"),
        (("--data", wds, "--split", "val", "--classes", classes), "names 1 classes, the shards have class 3"),
        (("--data", wds, "--split", "val", "--classes", by_folder), 'for shards, "names" is a list'),
        (("--data", shards, "--split", "val"), f"--split val is of no use for {shards}, whose layout is shards"),
        (("--data", shards, "--wnids", classes), "--wnids"),
        (("--data", named, "--layout", "captions"), "--layout captions needs --captions FILE.json"),
        (("--data", named, "--captions", missing), f"--captions {missing}: no such file"),
        (("--data", named, "--captions", classes), 'has no list of "images"'),
        (("--data", named, "--baseline", shards), "needs --data of shards"),
        (("--data", named, "--classes", missing), f"--classes {missing}: no such file"),
        (("--data", shards, "--layout", "folders"), f"{shards}: no folder in it, so no class"),
    ]
    for arguments, message in cases:
        assert message in refused(capsys, run[0], *arguments)
