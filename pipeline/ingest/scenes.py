"""Random numbers and the pictures of one style in, a scene out: what is drawn where, and the caption that says so.

A scene is planned first (pure, nothing rendered) and painted later, in any process, to the same pixels. A single
picture is a scene of one object whose caption is its name. Planning costs 0.1 ms, painting 3 ms an object.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .art import Picture, Pixels, ink_bounds, render

COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "light grey": (217, 217, 217),
    "pale blue": (204, 226, 250),
    "pale green": (208, 240, 205),
    "pale pink": (252, 215, 227),
    "pale yellow": (253, 246, 196),
    "beige": (240, 226, 200),
    "peach": (255, 213, 184),
    "mint": (176, 236, 213),
    "lavender": (220, 208, 245),
    "sky blue": (135, 200, 240),
    "turquoise": (90, 205, 200),
    "lime green": (165, 220, 90),
    "orange": (250, 170, 80),
    "salmon": (245, 145, 125),
    "purple": (175, 130, 210),
}
"""Light enough for dark outlines to show: two of the styles draw with them."""

SINGLE_COLOURS = tuple(COLOURS)[:10]
"""The paler ones."""

PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the middle",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)
"""The cells of a 3 x 3 grid, row by row."""

SIZES: dict[str, tuple[float, float]] = {"small": (0.20, 0.27), "": (0.32, 0.40), "big": (0.48, 0.62)}
"""Size word -> longer side as a share of the image, from and to. Gaps between them keep the words apart."""

NUM_OBJECTS = (0.2, 0.35, 0.27, 0.18)
"""How often a scene has one, two, three and four objects."""

JITTER = 0.03
"""How far a centre may lie from its cell's, as a share of the image: a small object still fits its cell."""

LAYOUT_ATTEMPTS = 20


@dataclass(frozen=True)
class Background:
    """One colour, a fade from one to another, or stripes of two."""

    kind: str
    """`plain`, `fade` or `stripes`."""
    colours: tuple[str, ...]
    horizontal: bool = False
    """Stripes that run from left to right; a fade whose colour changes from left to right."""
    period: int = 0
    """Pixels from one stripe to the next of its colour."""

    @property
    def phrase(self) -> str:
        if self.kind == "plain":
            return with_article(f"{self.colours[0]} background")
        first, second = self.colours
        if self.kind == "fade":
            start, end = PLACES[3:6:2] if self.horizontal else PLACES[1::6]
            return f"a background fading from {first} {start} to {second} {end}"
        return f"a background of {'horizontal' if self.horizontal else 'vertical'} {first} and {second} stripes"


@dataclass(frozen=True)
class Placed:
    """A picture and the square that it is centred in, its longer side filling it; in pixels."""

    picture: Picture
    left: int
    top: int
    side: int
    size: str = ""
    """Size word: `small`, `big` or none."""
    place: str = ""
    """One of PLACES; none in a single picture."""


@dataclass(frozen=True)
class Scene:
    """What to paint and what to say of it."""

    placed: tuple[Placed, ...]
    background: Background
    caption: str
    tags: tuple[str, ...] = ()
    """Words for a second caption."""
    class_id: int | None = None
    """Of the picture's name, where names are classes."""


def plan_scene(rng: np.random.Generator, pictures: Sequence[Picture], image_size: int) -> Scene:
    """Returns a scene of one to four different pictures out of one style's.

    Objects lie inside the image and do not overlap; each one's centre is in the cell that the caption names.
    """
    count = min(1 + int(rng.choice(len(NUM_OBJECTS), p=NUM_OBJECTS)), len(pictures))
    chosen = [pictures[int(i)] for i in rng.choice(len(pictures), count, replace=False)]
    placed = _lay_out(rng, chosen, image_size)
    background = _plan_background(rng, image_size)
    return Scene(placed, background, _caption(rng, placed, background))


def plan_single(rng: np.random.Generator, picture: Picture, image_size: int) -> Scene:
    """Returns one picture for training: 80-100 % of the frame, off centre by chance, half the time on white."""
    side = round(image_size * rng.uniform(0.8, 1.0))
    left, top = (int(rng.integers(0, image_size - side + 1)) for _ in range(2))
    colour = "white" if rng.random() < 0.5 else SINGLE_COLOURS[int(rng.integers(len(SINGLE_COLOURS)))]
    return Scene((Placed(picture, left, top, side),), Background("plain", (colour,)), picture.name, picture.tags)


def plan_portrait(picture: Picture, class_id: int, image_size: int) -> Scene:
    """Returns one picture for classification: 94 % of the frame, centred on white, always the same."""
    side = round(image_size * 0.94)
    offset = (image_size - side) // 2
    return Scene(
        (Placed(picture, offset, offset, side),), Background("plain", ("white",)), picture.name, class_id=class_id
    )


def paint(scene: Scene, image_size: int, trim: bool = True) -> tuple[Pixels, list[tuple[int, int, int, int]]]:
    """Returns the scene's pixels and, for each object, the box of its ink: left, top, right, bottom (exclusive).

    Pixels: uint8 [image_size, image_size, 3], red, green, blue.
    """
    canvas = paint_background(scene.background, image_size)
    boxes: list[tuple[int, int, int, int]] = []
    inks: dict[tuple[str, int], Pixels] = {}
    for placed in scene.placed:
        key = (placed.picture.url, placed.side)
        if key not in inks:
            inks[key] = render(placed.picture, placed.side, trim)
        ink = inks[key]
        height, width = ink.shape[:2]
        left, top = placed.left + (placed.side - width) // 2, placed.top + (placed.side - height) // 2
        window = canvas[top : top + height, left : left + width]
        opacity = ink[..., 3:].astype(np.uint16)
        window[:] = (ink[..., :3] * opacity + window * (255 - opacity) + 127) // 255
        bounds = ink_bounds(ink) or (0, 0, width, height)
        boxes.append((left + bounds[0], top + bounds[1], left + bounds[2], top + bounds[3]))
    return canvas, boxes


def paint_background(background: Background, image_size: int) -> Pixels:
    """Returns uint8 [image_size, image_size, 3]."""
    colours = np.array([COLOURS[name] for name in background.colours], np.float64)
    position = np.arange(image_size)
    if background.kind == "plain":
        line = np.repeat(colours, image_size, axis=0)
    elif background.kind == "fade":
        share = (position / (image_size - 1))[:, None]
        line = colours[0] * (1 - share) + colours[1] * share
    else:
        line = colours[position * 2 // background.period % 2]
    # A fade that is `horizontal` changes along a row; a stripe that is `horizontal` stays the same along it.
    along_row = background.horizontal == (background.kind == "fade")
    line = line.round().astype(np.uint8)
    shape = (image_size, image_size, 3)
    return np.broadcast_to(line[None] if along_row else line[:, None], shape).copy()


def with_article(noun: str, size: str = "") -> str:
    """Returns `a big apple`, `an umbrella`, `small scissors`: plurals go without an article."""
    words = f"{size} {noun}".strip()
    head = re.split(r": | \(| with | of | in | on | and | over | lifting | showing ", noun)[0].split()
    plural = bool(re.search(r"[^suio]s$", head[-1])) or head[0] in ("people", "women", "men")
    if plural and not noun[0].isdigit():
        return words
    return f"{'an' if _VOWEL_SOUND.match(words) else 'a'} {words}"


# Names keep their spelling, so the article follows the sound: an hourglass, an SOS button, a unicorn, a one-piece.
_VOWEL_SOUND = re.compile(r"(?!uni|us[ae]|eu|ewe|one)[aeiou]|hour|x-|SOS|NG |8", re.IGNORECASE)


def _lay_out(rng: np.random.Generator, chosen: Sequence[Picture], image_size: int) -> tuple[Placed, ...]:
    words = list(SIZES)
    attempt = 0
    while True:
        attempt += 1
        # Then small objects only: in different cells they do not touch, but for a pixel of rounding.
        last = attempt >= LAYOUT_ATTEMPTS
        cells = rng.choice(len(PLACES), len(chosen), replace=False)
        sizes = ["small" if last else words[int(i)] for i in rng.integers(len(words), size=len(chosen))]
        placed = tuple(
            _place(rng, picture, int(cell), size, image_size)
            for picture, cell, size in zip(chosen, cells, sizes, strict=True)
        )
        if not any(_overlap(one, other) for i, one in enumerate(placed) for other in placed[:i]):
            return placed


def _place(rng: np.random.Generator, picture: Picture, cell: int, size: str, image_size: int) -> Placed:
    side = round(image_size * rng.uniform(*SIZES[size]))
    centres = [(index + 0.5) / 3 + rng.uniform(-JITTER, JITTER) for index in (cell % 3, cell // 3)]
    left, top = (min(max(round(centre * image_size - side / 2), 0), image_size - side) for centre in centres)
    return Placed(picture, left, top, side, size, PLACES[cell])


def _overlap(one: Placed, other: Placed) -> bool:
    return (
        max(one.left, other.left) < min(one.left + one.side, other.left + other.side)
        and max(one.top, other.top) < min(one.top + one.side, other.top + other.side)
    )  # fmt: skip


def _plan_background(rng: np.random.Generator, image_size: int) -> Background:
    first, second = (tuple(COLOURS)[int(i)] for i in rng.choice(len(COLOURS), 2, replace=False))
    kind = ("plain", "plain", "fade", "stripes")[int(rng.integers(4))]
    if kind == "plain":
        return Background("plain", (first,))
    period = 2 * round(image_size * rng.uniform(0.06, 0.14)) if kind == "stripes" else 0
    return Background(kind, (first, second), bool(rng.integers(2)), period)


def _caption(rng: np.random.Generator, placed: Sequence[Placed], background: Background) -> str:
    things = [f"{with_article(item.picture.name, item.size)} {item.place}" for item in placed]
    listed = ", ".join(things)
    joined = " and ".join([", ".join(things[:-1]), things[-1]] if len(things) > 1 else things)
    return (
        f"{listed}, on {background.phrase}",
        f"{joined} on {background.phrase}",
        f"on {background.phrase}: {joined}",
        f"{background.phrase} with {joined}",
    )[int(rng.integers(4))]
