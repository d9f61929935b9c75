"""Icon sets and emoji labels in (npm tarballs), named pictures out; and a picture in, its pixels out.

A picture is an SVG that carries its name, tags and licence. Sets name their icons in different ways, so a label finds
its icon by code point where the set has a table, else by the label itself, else by another set's name for it.
Rendering costs about 3 ms for 120 px.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from .npm import read_json
from .recipe import Package, Style

Pixels = npt.NDArray[np.uint8]

COMPONENTS = 2
"""emojibase's group of skin tones and hair: parts of other emoji, not pictures."""

MEASURE_SIZE = 64
INK_ALPHA = 16
"""A pixel of at least this opacity (of 255) is ink; below it is the faint rim of a shadow."""

RENDERER_HINT = (
    "the starter's renderer is missing: `.venv/bin/pip install resvg-py==0.5.0` (`make` does it), "
    "then run the same command again"
)


@dataclass(frozen=True)
class Label:
    """An emoji by its English name."""

    name: str
    tags: tuple[str, ...]
    hexcode: str
    """Its code points as emojibase writes them: `1F481-200D-2640-FE0F`."""

    @cached_property
    def code(self) -> str:
        return plain_code(self.hexcode)


@dataclass(frozen=True)
class IconSet:
    """One drawing style as its package has it."""

    style: str
    package: str
    license: str
    icons: Mapping[str, str]
    """Icon name -> a whole SVG document; aliases included, hidden icons left out."""
    aliases: Mapping[str, str]
    """Alias -> icon name."""
    codes: Mapping[str, str]
    """Plain code -> icon name; empty for sets without a table."""


@dataclass(frozen=True)
class Picture:
    """One emoji in one style: all that is needed to draw it and to say what it is."""

    style: str
    name: str
    tags: tuple[str, ...]
    hexcode: str
    icon: str
    package: str
    license: str
    svg: str = field(repr=False)

    @property
    def url(self) -> str:
        """Where the art is from: `npm:@iconify-json/noto@1.2.9/icons.json#red-apple`."""
        return f"npm:{self.package}/icons.json#{self.icon}"


def plain_code(hexcode: str) -> str:
    """Returns code points in lower case without the variation selector, which sets write or leave out at will."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def read_labels(tarball: Path) -> list[Label]:
    """Returns the labels of an emojibase-data tarball in its order, without skin tones, hair and letter indicators."""
    (data,) = read_json(tarball, "en/data.json")
    if data is None:
        raise ValueError(f"{tarball} has no en/data.json; `labels` must be an emojibase-data package")
    return [
        Label(entry["label"], tuple(entry.get("tags", ())), entry["hexcode"])
        for entry in sorted(data, key=lambda entry: entry.get("order", 0))
        if entry.get("group", COMPONENTS) != COMPONENTS
    ]


def read_icons(tarball: Path, style: Style) -> IconSet:
    """Returns the icon set of an iconify tarball. Raises ValueError when the package is not one."""
    icons, info, chars = read_json(tarball, "icons.json", "info.json", "chars.json")
    if icons is None or info is None:
        raise ValueError(f"{style.package} has no icons.json and info.json; it must be an @iconify-json package")
    codes: Mapping[str, str] = chars or {}
    visible = {name: icon for name, icon in icons["icons"].items() if not icon.get("hidden")}
    links = {name: alias for name, alias in icons.get("aliases", {}).items() if alias["parent"] in visible}
    return IconSet(
        style=style.style,
        package=style.package,
        license=info["license"]["spdx"],
        icons={name: _document(icons, icon, {}) for name, icon in visible.items()}
        | {name: _document(icons, visible[alias["parent"]], alias) for name, alias in links.items()},
        aliases={name: alias["parent"] for name, alias in links.items()},
        codes={plain_code(code): name for code, name in codes.items()},
    )


def match(labels: Sequence[Label], sets: Sequence[IconSet]) -> list[Picture]:
    """Returns a picture for each set and each label that the set has an icon for, sets and labels in order.

    What no label names (skin-tone variants, letters, a set's own extras) is left out.
    """
    names = _other_names(labels, sets)
    pictures: list[Picture] = []
    for icon_set in sets:
        for label in labels:
            slugs = _slugs(label.name)
            candidates = [icon_set.codes.get(label.code, ""), *slugs, *sorted(names[label.code])]
            if icon := next((name for name in candidates if name in icon_set.icons), None):
                pictures.append(
                    Picture(
                        style=icon_set.style,
                        name=label.name,
                        tags=label.tags,
                        hexcode=label.hexcode,
                        icon=icon,
                        package=icon_set.package,
                        license=icon_set.license,
                        svg=icon_set.icons[icon],
                    )
                )
    return pictures


def collect(labels: Package, styles: Sequence[Style], tarballs: Sequence[Path]) -> list[Picture]:
    """Returns the pictures of a recipe. tarballs: the labels' one first, then one a style.

    Raises ValueError when a style matches no label, which means a package of another kind.
    """
    pictures = match(read_labels(tarballs[0]), [read_icons(t, s) for t, s in zip(tarballs[1:], styles, strict=True)])
    for style in styles:
        if not any(picture.style == style.style for picture in pictures):
            raise ValueError(f"no icon of {style.package} bears a name of {labels.package}")
    return pictures


def render(picture: Picture, side: int, trim: bool = True) -> Pixels:
    """Returns the picture, its longer side `side` pixels; `trim` crops it to its ink first, to 1/64 of the drawing.

    Returns uint8 [height, width, 4], red, green, blue and opacity, colours not multiplied by opacity.
    Raises ValueError when the picture has no ink or resvg-py is missing.
    """
    box = _ink_box(picture) if trim else _view(picture)
    scale = side / max(box[2:])
    return _rasterise(picture.svg, box, max(1, round(box[2] * scale)), max(1, round(box[3] * scale)))


def ink_bounds(pixels: Pixels) -> tuple[int, int, int, int] | None:
    """Returns left, top, right and bottom (exclusive) of what is not clear in uint8 [height, width, 4], if anything."""
    ink = pixels[..., 3] >= INK_ALPHA
    xs, ys = np.flatnonzero(ink.any(0)), np.flatnonzero(ink.any(1))
    return (int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1) if len(xs) else None


def check_renderer() -> None:
    """Raises ValueError, with the command that installs it, when resvg-py is not here."""
    try:
        import resvg_py  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ValueError(RENDERER_HINT) from None


# Dropped from names, not turned into hyphens; the first and the last two are typographic quotes.
_QUOTES = re.compile(r"[\u2019'.\u201c\u201d]")


def _slugs(name: str) -> list[str]:
    """Returns a label as icon names: lower case, no accents, words joined by hyphens; flags in both usual ways."""
    text = unicodedata.normalize("NFKD", name.lower().replace("#", " pound").replace("*", " asterisk"))
    text = "".join(char for char in text if not unicodedata.combining(char)).replace("&", " and ")
    slug = re.sub(r"[^a-z0-9]+", "-", _QUOTES.sub("", text)).strip("-")
    flag = slug.removeprefix("flag-")
    return [slug] if flag == slug else [slug, f"flag-for-flag-{flag}", f"flag-for-{flag}"]


def _other_names(labels: Sequence[Label], sets: Sequence[IconSet]) -> dict[str, set[str]]:
    """Returns plain code -> names that some set's table or aliases give it and that mean nothing else."""
    meanings: defaultdict[str, set[str]] = defaultdict(set)
    for icon_set in sets:
        for code, name in icon_set.codes.items():
            meanings[name].add(code)
    for icon_set in sets:
        for alias, name in icon_set.aliases.items():
            shared = meanings[alias] | meanings[name]
            meanings[alias], meanings[name] = set(shared), set(shared)
    # A label's own name is that label's, whatever an older set once called by it.
    taken = {slug for label in labels for slug in _slugs(label.name)}
    names: defaultdict[str, set[str]] = defaultdict(set)
    for name, codes in meanings.items():
        if len(codes) == 1 and name not in taken:
            names[next(iter(codes))].add(name)
    return names


def _document(defaults: Mapping[str, Any], icon: Mapping[str, Any], alias: Mapping[str, Any]) -> str:
    """Returns an iconify icon as an SVG document; an alias may mirror or turn it.

    The rules are those of https://iconify.design/docs/types/iconify-icon.html.
    """
    left, top = icon.get("left", defaults.get("left", 0)), icon.get("top", defaults.get("top", 0))
    width, height = icon.get("width", defaults.get("width", 16)), icon.get("height", defaults.get("height", 16))
    moves = ""
    if turns := alias.get("rotate", 0):
        moves += f"rotate({90 * turns} {left + width / 2} {top + height / 2}) "
    if alias.get("hFlip"):
        moves += f"translate({2 * left + width} 0) scale(-1 1) "
    if alias.get("vFlip"):
        moves += f"translate(0 {2 * top + height}) scale(1 -1) "
    body = f'<g transform="{moves.strip()}">{icon["body"]}</g>' if moves else icon["body"]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


_VIEW_BOX = re.compile(r'viewBox="([^"]*)"')

Box = tuple[float, float, float, float]
"""Left, top, width and height, in the SVG's own units."""


def _view(picture: Picture) -> Box:
    view = _VIEW_BOX.search(picture.svg)
    assert view is not None
    left, top, width, height = (float(number) for number in view[1].split())
    return left, top, width, height


def _ink_box(picture: Picture) -> Box:
    left, top, width, height = _view(picture)
    unit = max(width, height) / MEASURE_SIZE
    columns, rows = round(width / unit), round(height / unit)
    bounds = ink_bounds(_rasterise(picture.svg, (left, top, width, height), columns, rows))
    if bounds is None:
        raise ValueError(f"{picture.url} draws nothing; take another version of {picture.package}")
    x, y = width / columns, height / rows
    return left + bounds[0] * x, top + bounds[1] * y, (bounds[2] - bounds[0]) * x, (bounds[3] - bounds[1]) * y


def _rasterise(svg: str, box: Box, columns: int, rows: int) -> Pixels:
    """Returns the part of a document inside `box` as uint8 [rows, columns, 4]."""
    from resvg_py import svg_to_bytes

    # Given to svg_to_bytes instead, the size would keep the aspect and round up, a pixel too many.
    view = f'viewBox="{" ".join(f"{number:.6g}" for number in box)}" preserveAspectRatio="none"'
    sized = _VIEW_BOX.sub(f'{view} width="{columns}" height="{rows}"', svg, count=1)
    # System fonts differ between machines and take 100 ms to scan; no icon uses text.
    png = svg_to_bytes(svg_string=sized, skip_system_fonts=True)
    pixels = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels is not None
    assert pixels.shape == (rows, columns, 4)
    return np.ascontiguousarray(pixels[..., [2, 1, 0, 3]]).astype(np.uint8)
