import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.ingest.recipe import EmojiRecipe, differences, load, record
from pipeline.ingest.web_recipe import WebRecipe

ROOT = Path(__file__).parents[1]
STARTER = ROOT / "datasets" / "emoji.toml"


def edited(tmp_path: Path, old: str, new: str) -> Path:
    text = STARTER.read_text()
    assert old in text
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace(old, new, 1))
    return path


def test_the_starter_holds_one_style_out() -> None:
    recipe = load(STARTER)
    assert isinstance(recipe, EmojiRecipe)
    assert [style.style for style in recipe.styles if style.split == "held_out"] == ["openmoji"]
    assert len(recipe.styles) == 6
    assert (recipe.labels.name, recipe.labels.version) == ("emojibase-data", "17.0.0")
    assert (recipe.styles[0].name, recipe.styles[0].version) == ("@iconify-json/noto", "1.2.9")


def test_every_recipe_of_the_repository_loads() -> None:
    for path in (ROOT / "datasets").glob("*.toml"):
        load(path)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("seed = 0", "sede = 0", 'unknown key "sede"; did you mean "seed"?'),
        ("seed = 0", "zzz = 0", 'unknown key "zzz"; the keys are:'),
        ('split = "train"', 'spilt = "train"', 'unknown key "styles[0].spilt"; did you mean "split"?'),
        ("seed = 0", 'seed = "zero"', 'seed = "zero" must be a whole number'),
        ("seed = 0", "seed = true", "seed = true must be a whole number"),
        ("trim = true", "trim = 1", "trim = 1 must be true or false"),
        ("seed = 0", "seed = 1.5", "seed = 1.5 must be a whole number"),
        ("seed = 0", "seed = -1", "seed = -1 is outside 0 to"),
        ("samples_per_shard = 500", "samples_per_shard = 10001", "samples_per_shard = 10001 is outside 1 to 10000"),
        ('split = "train"', 'split = "test"', 'styles[0].split = "test" must be one of: train, held_out'),
        ('style = "noto"', "style = 3", "styles[0].style = 3 must be a string"),
        ('style = "noto-v1"', 'style = "noto"', 'style "noto" is listed twice'),
        ('style = "noto-v1"', 'style = "openmoji-black"', 'the "openmoji" styles are on both sides'),
        ('split = "held_out"', 'split = "train"', 'no style has split = "held_out"'),
        ("noto@1.2.9", "noto@latest", "is not NAME@VERSION with a full version"),
        ("sha512-DQiu", "sha256-DQiu", "integrity of @iconify-json/noto@1.2.9 is not a sha512 checksum"),
        ('style = "noto"\n', "", 'key "styles[0].style" is missing'),
        ("[labels]", "[[labels]]", "must be a table"),
        ('source = "emoji"', 'source = "emoij"', 'source = "emoij" is unknown; choose one of: emoji, web'),
        ('source = "emoji"', "", "source is missing; choose one of: emoji, web, or"),
        ('source = "emoji"', 'source = ["emoji"]', 'source = ["emoji"] is unknown'),
        ("seed = 0", "seed = ", "not valid TOML"),
    ],
)
def test_refusals_are_one_line_that_names_file_and_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = edited(tmp_path, old, new)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is checked below, whole
        load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert said in message
    assert "\n" not in message


def test_what_is_no_recipe_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nowhere\.toml: no such recipe file"):
        load(tmp_path / "nowhere.toml")
    with pytest.raises(ValueError, match="cannot be read as a recipe"):
        load(tmp_path)
    (tmp_path / "picture.toml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match="cannot be read as a recipe"):
        load(tmp_path / "picture.toml")


def test_differences_name_what_differs_and_nothing_else(tmp_path: Path) -> None:
    ours = record(load(STARTER))
    assert differences(ours, ours) == []
    theirs = record(load(edited(tmp_path, "seed = 0", "seed = 5")))
    assert differences(theirs, ours) == ["seed is 5 there and 0 here"]
    theirs = record(load(edited(tmp_path, 'style = "noto"', 'style = "google"')))
    assert differences(theirs, ours) == ["styles differ"]
    old: dict[str, Any] = {key: value for key, value in ours.items() if key != "seed"}
    assert differences(old, ours) == ["seed is null there and 0 here"]


def written(path: Path, text: str) -> Path:
    path.write_text(f'source = "web"\nmetadata = "ask"\nlicense = "none"\n{text}')
    return path


def test_a_web_recipe_says_only_what_differs(tmp_path: Path) -> None:
    recipe = load(written(tmp_path / "r.toml", 'filter = "a > 1 and b == 2"\n[columns]\nurl = "URL"\na = ["A", "aa"]'))
    assert isinstance(recipe, WebRecipe)
    assert recipe.needed == ("url", "caption", "a", "b")
    assert recipe.kept == ("url", "caption")
    assert recipe.candidates("url") == ("URL",)
    assert recipe.candidates("a") == ("A", "aa")
    assert recipe.candidates("b") == ("b",)
    assert recipe.opt_out == ("noai", "noimageai", "noindex", "noimageindex")
    assert json.loads(json.dumps(record(recipe))) == record(recipe)


def test_a_subset_extends_a_recipe_by_one_key(tmp_path: Path) -> None:
    written(tmp_path / "whole.toml", 'hash_kind = "md5"\nsave = ["score"]')
    (tmp_path / "part.toml").write_text('extends = "whole.toml"\nrows = 1_000_000\n')
    part, whole = load(tmp_path / "part.toml"), load(tmp_path / "whole.toml")
    assert differences(record(whole), record(part)) == ["rows is 0 there and 1000000 here"]
    (tmp_path / "a.toml").write_text('extends = "b.toml"\n')
    (tmp_path / "b.toml").write_text('extends = "a.toml"\n')
    with pytest.raises(ValueError, match="recipes extend one another"):
        load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text('extends = "laion400m"\n')
    with pytest.raises(ValueError, match=rf"laion400m: no such recipe file; {tmp_path}/a.toml extends it"):
        load(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("extends = 3\n")
    with pytest.raises(ValueError, match="it must be the name of a recipe file"):
        load(tmp_path / "a.toml")


def test_columns_of_an_extended_recipe_stay_but_for_those_that_are_named_anew(tmp_path: Path) -> None:
    written(tmp_path / "whole.toml", '[columns]\nurl = "URL"\ncaption = "TEXT"\nface_boxes = "boxes"')
    (tmp_path / "part.toml").write_text('extends = "whole.toml"\ncolumns = { caption = "alt", face_boxes = [] }\n')
    part = load(tmp_path / "part.toml")
    assert isinstance(part, WebRecipe)
    assert part.columns == {"url": ("URL",), "caption": ("alt",)}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("part", 'extend = "whole.toml"\nrows = 5', 'unknown key "extend"; did you mean "extends"?'),
        ("part", 'extand = "whole.toml"', 'unknown key "extand"; did you mean "extends"?'),
        ("part", 'sorce = "web"\nmetadata = "ask"', 'unknown key "sorce"; did you mean "source"?'),
        ("part", 'extends = "whole.toml"\nrow = 5', 'unknown key "row"; did you mean "rows"?'),
        ("part", "rows = 5", "source is missing; choose one of: emoji, web, or name a recipe by `extends`"),
        ("part", 'extends = "whole.toml"\nseed = 5', 'unknown key "seed"; did you mean "save"?'),
        ("whole", 'sorce = "web"\nmetadata = "ask"\nlicense = "none"', 'unknown key "sorce"; did you mean "source"?'),
    ],
)
def test_a_misspelt_key_is_named_before_anything_is_missed_for_want_of_it(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    written(tmp_path / "whole.toml", "")
    (tmp_path / "part.toml").write_text('extends = "whole.toml"\n')
    (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(ValueError, match=r"key|source is missing") as caught:
        load(tmp_path / "part.toml")
    # Of the file that holds it.
    assert str(caught.value).startswith(f"{tmp_path / name}.toml: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("flter = 'a > 1'", 'unknown key "flter"; did you mean "filter"?'),
        ("filter = 'a >'", "cannot be read"),
        ("rows = -1", "rows = -1 is outside 0 to"),
        ("rows = 1.5", "rows = 1.5 must be a whole number"),
        ("image_size = 4", "image_size = 4 is outside 8 to"),
        ("samples_per_shard = 20000", "samples_per_shard = 20000 is outside 1 to 10000"),
        ("resize_mode = 'border'", 'resize_mode = "border" must be one of: keep_ratio, keep_ratio_largest, no'),
        ("hash_kind = 'crc32'", 'hash_kind = "crc32" must be one of'),
        ("duplicates = 'maybe'", "must be one of: drop, keep"),
        ("save = ['width']", 'save = ["width"] is a column that every shard has'),
        ("[columns]\nurl = []", "columns.url = [] names no column"),
        ("[columns]\nurl = 3", "columns.url = 3 must be a list"),
        ("columns = 3", "columns = 3 must be a table"),
    ],
)
def test_web_refusals_are_one_line_that_names_file_and_key(tmp_path: Path, text: str, said: str) -> None:
    path = written(tmp_path / "r.toml", text)
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # the message is checked below, whole
        load(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.toml", "--out", "out"], "nowhere.toml: no such recipe file"),
        (["bad.toml", "--out", "out"], 'bad.toml: unknown key "sede"; did you mean "seed"?'),
    ],
)
def test_the_command_refuses_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    edited(tmp_path, "seed = 0", "sede = 0").rename(tmp_path / "bad.toml")
    done = subprocess.run(
        [sys.executable, ROOT / "ingest.py", *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {said}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
