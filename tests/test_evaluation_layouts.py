"""Class names, templates and labels of the data sets of the field, from their own files and from installed packages."""

import json
from pathlib import Path
from typing import Any

import pytest

from evaluation.classes import ClassList, prompts, read_class_file
from evaluation.folders import OBJECTNET_FILES, LabelledPaths, class_folders, holds_pictures
from evaluation.imagenet import imagenet_classes, imagenet_wnids, read_metadata_module, search_path
from evaluation.karpathy import karpathy_split

WNIDS = ["n00000001", "n00000002", "n00000003", "n00000010"]
GIVEN = ClassList("given", ["one", "two", "three", "ten"], {}, ["a {c}.", "the {c}."])
METADATA = """
OPENAI_IMAGENET_TEMPLATES = (
    lambda c: f'a bad photo of a {c}.',
    lambda name: f"{name}, {{drawn}}",
)
SIMPLE = OPENAI_IMAGENET_TEMPLATES[:1]
IMAGENET_CLASSNAMES = (
    "tench", "chef's hat",
    "missile",
)
"""


def package(site: Path, distribution: str, files: dict[str, str], version: str = "9.1") -> str:
    """Writes an installed package, as pip leaves it; returns the folder to look in. Importing it fails."""
    info = site / f"{distribution}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    for name, text in files.items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text)
        (site / name).parent.joinpath("__init__.py").write_text("raise RuntimeError('imported')")
    return str(site)


def folders(root: Path, *names: str, pictures: int = 2, suffix: str = ".JPEG") -> Path:
    """Makes class folders; nothing is decoded here, so the pictures are empty."""
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(pictures):
            (root / name / f"{i}{suffix}").touch()
    return root


def shown(found: LabelledPaths) -> list[tuple[str, str]]:
    """Returns (folder, class name) of each picture."""
    return [(path.parent.name, found.names[label]) for path, label in zip(found.paths, found.labels, strict=True)]


def test_open_clips_metadata_is_read_and_not_run(tmp_path: Path) -> None:
    site = package(tmp_path, "open_clip_torch", {"open_clip/zero_shot_metadata.py": METADATA})
    found = imagenet_classes([str(tmp_path / "nothing"), site])
    assert found == ClassList(
        "open_clip_torch 9.1", ["tench", "chef's hat", "missile"], {}, ["a bad photo of a {c}.", "{c}, {drawn}"]
    )
    assert prompts(found.names[:1], found.templates) == ["a bad photo of a tench.", "tench, {drawn}"]


@pytest.mark.parametrize(
    "template",
    ["lambda c: 'a ' + c", "lambda c: f'{c!r}'", "lambda c: f'{c:>9}'", "lambda c: f'{c.upper()}'",
     "lambda c: f'{__import__(chr(111) + chr(115))}'", "'a {c}'", "lambda a, b: f'{a}'"],
)  # fmt: skip
def test_a_template_of_another_form_is_refused(tmp_path: Path, template: str) -> None:
    file = tmp_path / "zero_shot_metadata.py"
    file.write_text(f"IMAGENET_CLASSNAMES = ['a']\nOPENAI_IMAGENET_TEMPLATES = ({template},)\n")
    with pytest.raises(ValueError, match=r"line 2 is no template of the form lambda c: f'...'; give --classes"):
        read_metadata_module(file, "it")


def test_clip_benchmarks_files_serve_too(tmp_path: Path) -> None:
    folder = "clip_benchmark/datasets"
    files = {
        f"{folder}/en_classnames.json": json.dumps({"pets": ["cat"], "imagenet1k": ["tench", "goldfish"]}),
        f"{folder}/en_zeroshot_classification_templates.json": json.dumps({"imagenet1k": ["a {c}."]}),
        f"{folder}/builder.py": f"import torch\n\nall_imagenet_wordnet_ids = {WNIDS}\n",
    }
    site = package(tmp_path, "clip_benchmark", files)
    assert imagenet_classes([site]) == ClassList("clip_benchmark 9.1", ["tench", "goldfish"], {}, ["a {c}."])
    assert imagenet_wnids([site]) == WNIDS


def test_what_no_package_holds_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no installed package holds ImageNet's class names: give --classes") as names:
        imagenet_classes([str(tmp_path)])
    with pytest.raises(ValueError, match=r"give --wnids FILE, one wnid \(n01440764\) a line") as wnids:
        imagenet_wnids([str(tmp_path)])
    assert "\n" not in f"{names.value}{wnids.value}"
    site = package(tmp_path, "open_clip_torch", {"open_clip/zero_shot_metadata.py": "names = 1\n"})
    with pytest.raises(ValueError, match="has no IMAGENET_CLASSNAMES; give --classes"):
        imagenet_classes([site])


def test_the_peers_environment_is_looked_in() -> None:
    found = [path for path in search_path() if ".venv-peers" in path]
    assert bool(found) == (Path(__file__).parents[1] / ".venv-peers" / "lib").is_dir()


@pytest.mark.parametrize("subset", [WNIDS, WNIDS[1:3], [WNIDS[3]]])
def test_wnids_are_the_classes_that_have_a_folder(tmp_path: Path, subset: list[str]) -> None:
    data = folders(tmp_path / "val", *subset)
    (data / "README.txt").touch()
    order = tmp_path / "wnids.txt"
    order.write_text("".join(f"{wnid} its name, and others\n" for wnid in WNIDS))
    found = class_folders(data, GIVEN, order, [])
    assert found.names == [GIVEN.names[WNIDS.index(wnid)] for wnid in subset]
    assert shown(found) == [(wnid, GIVEN.names[WNIDS.index(wnid)]) for wnid in subset for _ in range(2)]
    assert (found.layout, found.templates, found.left_out) == ("class folders: wnids", GIVEN.templates, [])


def test_wnids_and_names_from_packages(tmp_path: Path) -> None:
    data = folders(tmp_path / "val", "n00000003", "n00000001", pictures=1)
    site = package(tmp_path / "site", "open_clip_torch", {"open_clip/zero_shot_metadata.py": METADATA})
    package(tmp_path / "site", "timm", {"timm/data/_info/imagenet_synsets.txt": "\n".join(WNIDS[:3])})
    found = class_folders(data, None, None, [site])
    assert shown(found) == [("n00000001", "tench"), ("n00000003", "missile")]
    assert found.class_source == "open_clip_torch 9.1"
    assert class_folders(data, ClassList("mine", (), {}, ["{c}!"]), None, [site]).templates == ["{c}!"]
    with pytest.raises(ValueError, match="given names 4 classes, and there are 3 wnids"):
        class_folders(data, GIVEN, None, [site])
    folders(data, "n99999999")
    with pytest.raises(ValueError, match="n99999999 is none of the 3 classes; give names by folder"):
        class_folders(data, None, None, [site])


def test_a_thousand_wnids_need_no_list(tmp_path: Path) -> None:
    wnids = [f"n{7 * i:08d}" for i in range(1000)]
    folders(tmp_path / "val", *wnids, pictures=0)
    (tmp_path / "val" / wnids[734] / "x.jpg").touch()
    names = [f"name {i}" for i in range(1000)]
    found = class_folders(tmp_path / "val", ClassList("mine", names, {}, ["{c}"]), None, [])
    assert found.names == names
    assert shown(found) == [(wnids[734], "name 734")]


def test_numbers_are_classes_and_not_sorted_as_text(tmp_path: Path) -> None:
    data = folders(tmp_path / "v2", "10", "2", "0", pictures=1)
    names = [f"name {i}" for i in range(11)]
    found = class_folders(data, ClassList("mine", names, {}, ["{c}"]), None, [])
    assert shown(found) == [("0", "name 0"), ("2", "name 2"), ("10", "name 10")]
    with pytest.raises(ValueError, match=r"what its 3 numbered classes are called is not known; write classnames\.txt"):
        class_folders(data, None, None, [])
    (data / "classnames.txt").write_text("\n".join(names[:10]))
    with pytest.raises(ValueError, match="class 10 is beyond the 10 that"):
        class_folders(data, None, None, [])
    (data / "classnames.txt").write_text("\n".join(names))
    (data / "zeroshot_classification_templates.txt").write_text("see {c}\n")
    found = class_folders(data, None, None, [])
    assert (found.names, found.templates) == (["name 0", "name 2", "name 10"], ["see {c}"])


def test_a_thousand_numbers_are_imagenets(tmp_path: Path) -> None:
    data = folders(tmp_path / "v2", *map(str, range(1000)), pictures=0)
    (data / "999" / "x.jpeg").touch()
    names = "".join(f"'name {i}', " for i in range(1000))
    text = f"IMAGENET_CLASSNAMES = ({names})\nOPENAI_IMAGENET_TEMPLATES = (lambda c: f'a {{c}}',)\n"
    site = package(tmp_path / "site", "open_clip_torch", {"open_clip/zero_shot_metadata.py": text})
    found = class_folders(data, None, None, [site])
    assert shown(found) == [("999", "name 999")]
    assert (len(found.names), found.templates) == (1000, ["a {c}"])


def test_named_folders(tmp_path: Path) -> None:
    data = folders(tmp_path / "pets", "red_fox", "cat", "old ones", pictures=1, suffix=".webp")
    folders(data, ".hidden", "__MACOSX")
    (data / "cat" / "._0.jpg").touch()
    (data / "cat" / "notes.txt").touch()
    (data / "cat" / "more").mkdir()
    (data / "cat" / "more" / "1.PNG").touch()
    found = class_folders(data, None, None, [])
    assert found.names == ["cat", "old ones", "red fox"]
    assert found.templates == ["{c}"]
    assert [str(path.relative_to(data)) for path in found.paths] == [
        "cat/0.webp", "cat/more/1.PNG", "old ones/0.webp", "red_fox/0.webp",
    ]  # fmt: skip
    chosen = ClassList("mine", (), {"red_fox": "fox", "cat": "tabby", "gone": "x"}, [])
    found = class_folders(data, chosen, None, [])
    assert (found.names, found.left_out) == (["tabby", "fox"], ["old ones"])
    assert class_folders(data, ClassList("mine", ["a", "b", "c"], {}, []), None, []).names == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"mine names 2 classes, and .* has 3 class folders"):
        class_folders(data, ClassList("mine", ["a", "b"], {}, []), None, [])
    with pytest.raises(ValueError, match="mine names none of the class folders"):
        class_folders(data, ClassList("mine", (), {"dog": "dog"}, []), None, [])
    with pytest.raises(ValueError, match="are not named by wnids; leave it out"):
        class_folders(data, None, tmp_path / "wnids.txt", [])


@pytest.mark.parametrize("place", ["mappings", ".", "images/mappings"])
def test_objectnet_is_scored_among_what_imagenet_has_too(tmp_path: Path, place: str) -> None:
    root = tmp_path / "objectnet-1.0"
    data = folders(root / "images", "alarm_clock", "bath_towel", "air_freshener", pictures=1, suffix=".png")
    with pytest.raises(ValueError, match="which folders are the 113 classes that ImageNet has too"):
        class_folders(data, None, None, [])
    label_of = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "bath_towel": "Bath towel"}
    overlap = {"Alarm clock": "analog clock; digital clock", "Bath towel": "bath towel", "Bench": "park bench"}
    (root / place).mkdir(exist_ok=True)
    for name, values in zip(OBJECTNET_FILES, (label_of, overlap), strict=True):
        (root / place / name).write_text(json.dumps(values))
    if place == "images/mappings":
        (data / "mappings" / "not_a_class.txt").touch()
    templates = ClassList("mine", (), {}, ["a {c}"])
    found = class_folders(data, templates, None, [])
    assert found.layout == "class folders: ObjectNet"
    assert shown(found) == [("alarm_clock", "alarm clock"), ("bath_towel", "bath towel")]
    assert "air_freshener" in found.left_out
    with pytest.raises(ValueError, match="no installed package holds ImageNet's class names"):
        class_folders(data, None, None, [])
    (root / place / OBJECTNET_FILES[0]).write_text("[]")
    with pytest.raises(ValueError, match="is not ObjectNet's"):
        class_folders(data, templates, None, [])


def test_a_stray_folder_is_named(tmp_path: Path) -> None:
    data = folders(tmp_path / "val", *(f"n{i:08d}" for i in range(20)), "leftover")
    with pytest.raises(ValueError, match="leftover is not of the wnids that the other class folders are; move it away"):
        class_folders(data, GIVEN, None, [])
    with pytest.raises(ValueError, match="no picture in its 2 class folders"):
        class_folders(folders(tmp_path / "empty", "cat", "dog", pictures=0), None, None, [])
    assert holds_pictures(data)
    assert not holds_pictures(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file or directory; give a JSON file"),
        ("{", "cannot be read as JSON"),
        ("[]", "is no JSON object; write"),
        ("{}", "is empty; write"),
        ('{"name": ["a"]}', 'unknown key "name"; it takes "names" and "templates"'),
        ('{"names": "a"}', '"names" is no list of texts'),
        ('{"names": ["a", " "]}', '" " in "names" is no text'),
        ('{"names": {"f": 3}}', '3 in "names" is no text'),
        ('{"templates": ["a photo"]}', r"no \{c\} in template 'a photo'; put \{c\} where"),
        ('{"templates": {"a": "{c}"}}', '"templates" is no list of texts'),
    ],
)
def test_malformed_class_files_name_the_fix(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "classes.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_class_file(file)
    assert str(caught.value).startswith(f"--classes {file}")
    assert "\n" not in str(caught.value)


def test_class_files(tmp_path: Path) -> None:
    file = tmp_path / "classes.json"
    file.write_text(json.dumps({"names": ["chat noir", "café"], "templates": ["une {c}"]}))
    assert read_class_file(file) == ClassList(str(file), ["chat noir", "café"], {}, ["une {c}"])
    file.write_text(json.dumps({"names": {"n01440764": "tench"}}))
    assert read_class_file(file) == ClassList(str(file), (), {"n01440764": "tench"}, [])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("tench\n", "tench is no wnid such as"),
        ("n00000001\nn00000001\n", "stands there twice"),
        (None, "cannot be read"),
    ],
)
def test_malformed_wnids(tmp_path: Path, lines: str | None, message: str) -> None:
    data, file = folders(tmp_path / "val", *WNIDS), tmp_path / "wnids.txt"
    if lines is not None:
        file.write_text(lines)
    with pytest.raises(ValueError, match=message):
        class_folders(data, GIVEN, file, [])


def entry(name: str, split: str, *texts: str, **more: Any) -> dict[str, Any]:
    return {"filename": name, "split": split, "sentences": [{"raw": text, "tokens": []} for text in texts], **more}


def test_karpathys_split(tmp_path: Path) -> None:
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / "a.jpg").touch()
    (tmp_path / "b.jpg").touch()
    images = [
        entry("a.jpg", "test", "one", "two", filepath="val2014", cocoid=1),
        entry("t.jpg", "train", "no", filepath="val2014"),
        entry("b.jpg", "test", "three", filepath="val2014"),
        entry("gone.jpg", "test", "four", "five"),
    ]
    file = tmp_path / "dataset.json"
    file.write_text(json.dumps({"images": images, "dataset": "coco"}))
    found = karpathy_split(file, tmp_path, "test")
    assert found.paths == [tmp_path / "val2014" / "a.jpg", tmp_path / "b.jpg", tmp_path / "gone.jpg"]
    assert found.captions == ["one", "two", "three", "four", "five"]
    assert found.image_of_caption == [0, 0, 1, 2, 2]
    with pytest.raises(ValueError, match="no caption of split 'val'; it has test, train"):
        karpathy_split(file, tmp_path, "val")
    for broken, message in (
        ([], 'has no list of "images"'), ({"images": {}}, 'has no list of "images"'), ({"images": []}, "it has none"),
        ({"images": [{"split": "test"}]}, "image 0 lacks filename, split or sentences"), ({"images": [3]}, "image 0"),
    ):  # fmt: skip
        file.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            karpathy_split(file, tmp_path, "test")
