import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ingest.art import Picture
from pipeline.ingest.groups import BIG, COUNTS, SMALL, plan_groups, plural
from pipeline.ingest.scenes import (
    COLOURS,
    PLACES,
    SINGLE_COLOURS,
    SIZES,
    Background,
    Placed,
    Scene,
    paint,
    paint_background,
    plan_portrait,
    plan_scene,
    plan_single,
    with_article,
)

NAMES = ["red apple", "glasses", "flag: Peru", "keycap: 7", "umbrella", "people hugging", "UFO", "cat"]


def square(name: str, colour: str = "#123456", tags: tuple[str, ...] = ()) -> Picture:
    """A picture whose ink is a square that leaves a margin in its drawing."""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
        f'<rect x="4" y="8" width="16" height="16" fill="{colour}"/></svg>'
    )
    return Picture("flat", name, tags, "1F34E", name.replace(" ", "-"), "@test/flat@1.0.0", "MIT", svg)


PICTURES = [square(name) for name in NAMES]
seeds = st.integers(0, 2**63 - 1)


def plan(seed: int, image_size: int = 128, pictures: list[Picture] = PICTURES) -> Scene:
    return plan_scene(np.random.default_rng(seed), pictures, image_size)


@given(seeds, st.sampled_from([32, 100, 128, 224]))
def test_objects_lie_apart_inside_the_image_where_the_caption_says(seed: int, image_size: int) -> None:
    scene = plan(seed, image_size)
    assert 1 <= len(scene.placed) <= 4
    assert len({item.picture.name for item in scene.placed}) == len(scene.placed)
    covered = np.zeros((image_size, image_size), int)
    for item in scene.placed:
        covered[item.top : item.top + item.side, item.left : item.left + item.side] += 1
        assert min(item.left, item.top) >= 0
        assert max(item.left, item.top) + item.side <= image_size
        column, row = ((start + item.side / 2) * 3 / image_size for start in (item.left, item.top))
        assert PLACES[int(row) * 3 + int(column)] == item.place
        low, high = SIZES[item.size]
        assert low * image_size - 1 <= item.side <= high * image_size + 1
    assert covered.max() == 1


@given(seeds)
def test_captions_say_all_that_is_there_and_nothing_else(seed: int) -> None:
    scene = plan(seed)
    rest = scene.caption
    for phrase in [scene.background.phrase] + [
        f"{with_article(item.picture.name, item.size)} {item.place}" for item in scene.placed
    ]:
        assert rest.count(phrase) == 1
        rest = rest.replace(phrase, "")
    assert re.fullmatch(r"[ ,:]*((on|and|with)[ ,:]*)*", rest)
    for item in scene.placed:
        assert item.picture.name in scene.caption


def test_all_words_places_and_backgrounds_occur() -> None:
    scenes = [plan(seed) for seed in range(400)]
    items = [item for scene in scenes for item in scene.placed]
    assert {item.size for item in items} == set(SIZES)
    assert {item.place for item in items} == set(PLACES)
    assert {len(scene.placed) for scene in scenes} == {1, 2, 3, 4}
    assert {scene.background.kind for scene in scenes} == {"plain", "fade", "stripes"}
    assert {colour for scene in scenes for colour in scene.background.colours} == set(COLOURS)
    assert len({scene.caption for scene in scenes}) > 390
    assert plan(5) == plan(5)


def test_a_style_with_few_pictures_makes_small_scenes() -> None:
    assert all(len(plan(seed, pictures=PICTURES[:1]).placed) == 1 for seed in range(20))


@settings(max_examples=30)
@given(seeds)
def test_paint_puts_ink_in_the_boxes_and_background_elsewhere(seed: int) -> None:
    scene = plan(seed)
    pixels, boxes = paint(scene, 128)
    assert pixels.shape == (128, 128, 3)
    assert pixels.dtype == np.uint8
    outside = np.ones((128, 128), bool)
    for item, (left, top, right, bottom) in zip(scene.placed, boxes, strict=True):
        assert (left, top, right, bottom) == (item.left, item.top, item.left + item.side, item.top + item.side)
        assert (pixels[top + 1 : bottom - 1, left + 1 : right - 1] == (0x12, 0x34, 0x56)).all()
        outside[top:bottom, left:right] = False
    assert (pixels[outside] == paint_background(scene.background, 128)[outside]).all()


def test_a_picture_wider_than_high_is_centred_in_its_square() -> None:
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 64 64"><rect width="64" height="16" fill="red"/></svg>'
    wide = Picture("flat", "bar", (), "0", "bar", "@test/flat@1.0.0", "MIT", svg)
    pixels, boxes = paint(Scene((Placed(wide, 10, 20, 80),), Background("plain", ("white",)), "bar"), 128)
    assert boxes == [(10, 50, 90, 70)]
    assert (pixels[50:70, 10:90] == (255, 0, 0)).all()
    assert (pixels[:50] == 255).all()


def test_half_opaque_ink_mixes_with_the_background() -> None:
    clear = square("ghost", colour="#ff000080")
    pixels, ((left, top, right, bottom),) = paint(plan_portrait(clear, 0, 64), 64)
    middle = pixels[(top + bottom) // 2, (left + right) // 2].astype(int)
    assert abs(middle - [255, 127, 127]).max() <= 1


def test_backgrounds_look_as_their_phrases_say() -> None:
    plain = Background("plain", ("orange",))
    assert plain.phrase == "an orange background"
    assert (paint_background(plain, 40) == COLOURS["orange"]).all()

    across = Background("fade", ("white", "mint"), horizontal=True)
    assert across.phrase == "a background fading from white on the left to mint on the right"
    pixels = paint_background(across, 40)
    assert (pixels[:, 0] == COLOURS["white"]).all()
    assert (pixels[:, -1] == COLOURS["mint"]).all()
    assert (np.diff(pixels[0, :, 0].astype(int)) <= 0).all()

    down = Background("fade", ("white", "mint"))
    assert down.phrase == "a background fading from white at the top to mint at the bottom"
    assert (paint_background(down, 40) == pixels.transpose(1, 0, 2)).all()

    stripes = Background("stripes", ("white", "mint"), horizontal=True, period=10)
    assert stripes.phrase == "a background of horizontal white and mint stripes"
    pixels = paint_background(stripes, 40)
    assert (pixels == pixels[:, :1]).all()
    assert (pixels[:5] == COLOURS["white"]).all()
    assert (pixels[5:10] == COLOURS["mint"]).all()
    assert (pixels[10:] == pixels[:-10]).all()
    upright = Background("stripes", ("white", "mint"), period=10)
    assert upright.phrase == "a background of vertical white and mint stripes"
    assert (paint_background(upright, 40) == pixels.transpose(1, 0, 2)).all()


@given(seeds)
def test_training_singles_stay_in_the_frame(seed: int) -> None:
    scene = plan_single(np.random.default_rng(seed), square("cat", tags=("pet", "tail")), 128)
    (item,) = scene.placed
    assert 102 <= item.side <= 128
    assert min(item.left, item.top) >= 0
    assert max(item.left, item.top) + item.side <= 128
    assert (scene.caption, scene.tags, scene.class_id) == ("cat", ("pet", "tail"), None)


def test_portraits_are_centred_on_white_and_carry_their_class() -> None:
    scene = plan_portrait(square("cat", tags=("pet",)), 7, 128)
    assert (scene.caption, scene.tags, scene.class_id) == ("cat", (), 7)
    pixels, boxes = paint(scene, 128)
    assert boxes == [(4, 4, 124, 124)]
    assert (pixels[:4] == 255).all()


@pytest.mark.parametrize(
    ("noun", "size", "expected"),
    [
        ("red apple", "", "a red apple"),
        ("red apple", "big", "a big red apple"),
        ("umbrella", "", "an umbrella"),
        ("umbrella", "small", "a small umbrella"),
        ("unicorn", "", "a unicorn"),
        ("hourglass done", "", "an hourglass done"),
        ("one o’clock", "", "a one o’clock"),  # noqa: RUF001  # emojibase writes it so
        ("SOS button", "", "an SOS button"),
        ("glasses", "", "glasses"),
        ("scissors", "big", "big scissors"),
        ("people with bunny ears", "", "people with bunny ears"),
        ("man with bunny ears", "", "a man with bunny ears"),
        ("flag: United States", "", "a flag: United States"),
        ("bus", "", "a bus"),
        ("water glass", "", "a water glass"),
        ("2nd place medal", "", "a 2nd place medal"),
        ("x-ray", "", "an x-ray"),
        ("ID button", "", "an ID button"),
        ("rhinoceros", "", "a rhinoceros"),
        ("man lifting weights", "big", "a big man lifting weights"),
    ],
)
def test_articles(noun: str, size: str, expected: str) -> None:
    assert with_article(noun, size) == expected


# Grouped scenes

GROUPED = [square(name) for name in ("cat", "rose", "bus", "butterfly", "umbrella", "tomato", "cactus", "octopus")]
SAID = re.compile(
    rf"(?P<count>an?|{'|'.join(COUNTS[1:])}) (?:(?P<size>small|big) )?(?P<noun>[a-z]+)"
    rf"(?: (?P<place>{'|'.join(PLACES)}))?"
)
BETWEEN = {"to the left of": (0, 1), "to the right of": (0, -1), "above": (1, 1), "below": (1, -1)}


def plan_grouped(seed: int, image_size: int = 112, pictures: list[Picture] = GROUPED) -> Scene:
    return plan_groups(np.random.default_rng(seed), pictures, image_size)


@given(seeds, st.sampled_from([64, 112, 128]))
def test_grouped_captions_say_how_many_how_big_and_where(seed: int, image_size: int) -> None:
    scene = plan_grouped(seed, image_size)
    groups: dict[str, list[Placed]] = {}
    for item in scene.placed:
        groups.setdefault(item.picture.name, []).append(item)
    said = scene.caption
    assert set(scene.background.colours) <= set(SINGLE_COLOURS)
    between = next((words for words in BETWEEN if f" {words} " in said), None)
    parts = said.split(f" {between} ") if between else re.split(r", | and ", said)
    assert len(parts) == len(groups)
    centres: list[tuple[float, float]] = []
    for part, (name, items) in zip(parts, groups.items(), strict=True):
        found = SAID.fullmatch(part)
        assert found is not None, part
        assert found["noun"] == (name if len(items) == 1 else plural(name))
        one = with_article(name, items[0].size).split()[0]
        assert found["count"] == (one if len(items) == 1 else COUNTS[len(items) - 1])
        assert (found["size"] or "") == items[0].size
        assert (found["size"] is not None) == (len(items) == 1)
        low, high = BIG if items[0].size == "big" else SMALL
        assert low * image_size - 1 <= items[0].side <= high * image_size + 1
        assert len({(item.place, item.side) for item in items}) == 1
        assert found["place"] == (None if between else items[0].place)
        for item in items:
            column, row = ((start + item.side / 2) * 3 / image_size for start in (item.left, item.top))
            assert PLACES[int(row) * 3 + int(column)] == item.place
        centres.append((sum(i.left + i.side / 2 for i in items), sum(i.top + i.side / 2 for i in items)))
        centres[-1] = (centres[-1][0] / len(items), centres[-1][1] / len(items))
    if between:
        axis, direction = BETWEEN[between]
        assert (centres[1][axis] - centres[0][axis]) * direction > image_size / 9
        assert abs(centres[1][1 - axis] - centres[0][1 - axis]) < image_size / 3


@given(seeds)
def test_grouped_things_lie_apart_inside_the_image(seed: int) -> None:
    scene = plan_grouped(seed)
    covered = np.zeros((112, 112), int)
    for item in scene.placed:
        assert min(item.left, item.top) >= 0
        assert max(item.left, item.top) + item.side <= 112
        covered[item.top : item.top + item.side, item.left : item.left + item.side] += 1
    assert covered.max() == 1


def test_grouped_scenes_are_of_many_kinds() -> None:
    scenes = [plan_grouped(seed) for seed in range(400)]
    captions = [scene.caption for scene in scenes]
    for word in (*COUNTS[1:], *BETWEEN, *PLACES, "small", "big"):
        assert any(word in caption for caption in captions), word
    assert len(set(captions)) > 300
    assert {scene.background.colours[0] for scene in scenes} == set(SINGLE_COLOURS)
    assert plan_grouped(5) == plan_grouped(5)
    assert len({item.picture.name for item in plan_grouped(3, pictures=GROUPED[:1]).placed}) == 1


@pytest.mark.parametrize(
    ("noun", "expected"),
    [
        ("cat", "cats"),
        ("bus", "buses"),
        ("fox", "foxes"),
        ("witch", "witches"),
        ("cherry", "cherries"),
        ("key", "keys"),
        ("tomato", "tomatoes"),
        ("mouse", "mice"),
        ("scissors", "scissors"),
        ("red apple", "red apples"),
        ("bowl with spoon", "bowls with spoon"),
    ],
)
def test_plurals(noun: str, expected: str) -> None:
    assert plural(noun) == expected
