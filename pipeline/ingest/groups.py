"""Random numbers and the pictures of one style in, a grouped scene out: few kinds of things, small, counted and placed.

What the caption says of such a scene (how many, which, how big, where, on which side of one another) is lost when the
image is made small, so these scenes tell how many image tokens a model needs. The background is not said: it shows at
any size, and a small model would learn little else.
"""

import re
from collections.abc import Sequence

import numpy as np

from .art import Picture
from .scenes import PLACES, SINGLE_COLOURS, Background, Placed, Scene, with_article

NUM_GROUPS = (0.3, 0.7)
"""How often a scene has one kind of things and two. A caption of two fits into 16 text tokens."""
COUNTS = ("", "two", "three", "four")
SMALL, BIG = (0.12, 0.145), (0.24, 0.30)
"""Longer side as a share of the image, from and to. A thing that is there several times is small, without the word."""
RELATION_SHARE = 0.5
"""How often two groups in one row or column are placed by each other alone."""

_SPOTS: tuple[tuple[tuple[float, float], ...], ...] = (
    ((0, 0),),
    ((0, 0), (1, 1)),
    ((0, 0), (1, 0), (0.5, 1)),
    ((0, 0), (1, 0), (0, 1), (1, 1)),
)
"""Where the things of a group stand, in steps of their side and a pixel; x, y."""
_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "man": "men", "woman": "women", "wolf": "wolves", "knife": "knives",
    "leaf": "leaves", "foot": "feet", "tooth": "teeth", "fish": "fish", "sheep": "sheep", "deer": "deer",
}  # fmt: skip


def plan_groups(rng: np.random.Generator, pictures: Sequence[Picture], image_size: int) -> Scene:
    """Returns a scene of one or two groups, each of one to four small things or one big one in a cell of its own.

    Scenes of two groups that share a row or column say, half of the time, only how these stand to each other.
    pictures: those of one style.
    """
    wanted = 1 + int(rng.choice(len(NUM_GROUPS), p=NUM_GROUPS))
    chosen = [pictures[int(i)] for i in rng.choice(len(pictures), min(wanted, len(pictures)), replace=False)]
    cells = [int(cell) for cell in rng.choice(len(PLACES), len(chosen), replace=False)]
    placed: list[Placed] = []
    things: list[str] = []
    for picture, cell in zip(chosen, cells, strict=True):
        count = 1 + int(rng.integers(len(COUNTS)))
        size = ("small", "big")[int(rng.integers(2))] if count == 1 else ""
        side = int(image_size * rng.uniform(*(BIG if size == "big" else SMALL)))
        # Anywhere in the cell, and never out of it: so groups lie apart.
        slack = image_size / 3 - (side if count == 1 else 2 * side + 1)
        left, top = (int(index * image_size / 3 + rng.uniform(0, slack)) for index in (cell % 3, cell // 3))
        for x, y in _SPOTS[count - 1]:
            at = (left + int(x * (side + 1)), top + int(y * (side + 1)))
            placed.append(Placed(picture, *at, side, size, PLACES[cell]))
        things.append(with_article(picture.name, size) if count == 1 else f"{COUNTS[count - 1]} {plural(picture.name)}")
    background = Background("plain", (SINGLE_COLOURS[int(rng.integers(len(SINGLE_COLOURS)))],))
    relative = rng.random() < RELATION_SHARE
    return Scene(tuple(placed), background, _said(rng, things, cells, relative=relative))


def plural(noun: str) -> str:
    """Returns several of what a noun names: `cats`, `foxes`, `cherries`; a noun that is plural stays."""
    head, split, rest = re.match(r"(.*?)( with | of | in | on |$)(.*)", noun).groups()  # pyright: ignore[reportOptionalMemberAccess]
    first, space, last = head.rpartition(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif with_article(last) == last:
        pass  # no article: a plural
    elif re.search(r"(s|x|z|ch|sh|(to))$", last):
        last += "es"
    elif re.search(r"[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{first}{space}{last}{split}{rest}"


def _said(rng: np.random.Generator, things: Sequence[str], cells: Sequence[int], *, relative: bool) -> str:
    if len(things) == 2 and relative:
        (row, column), (other_row, other_column) = (divmod(cell, 3) for cell in cells)
        if row == other_row:
            return f"{things[0]} to the {'left' if column < other_column else 'right'} of {things[1]}"
        if column == other_column:
            return f"{things[0]} {'above' if row < other_row else 'below'} {things[1]}"
    said = [f"{thing} {PLACES[cell]}" for thing, cell in zip(things, cells, strict=True)]
    return (", ", " and ")[int(rng.integers(2))].join(said)
