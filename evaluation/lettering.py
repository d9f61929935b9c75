"""Text that a picture can show: within a width, and only characters that the font has."""

from functools import cache

from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ft2font import FT2Font

FONT = "DejaVu Sans"
"""Comes with matplotlib, so it is there on every machine."""

_MISSING = "□"


def fitted(text: str, width_pt: float, size_pt: float, *, bold: bool = False) -> str:
    """Returns text on one line, cut with an ellipsis to at most `width_pt` points, without a character FONT lacks."""
    text = drawable(" ".join(text.split()))
    if text_width_pt(text, size_pt, bold=bold) <= width_pt:
        return text
    low, high = 0, len(text)  # the longest cut that fits
    while low < high:
        middle = (low + high + 1) // 2
        if text_width_pt(_cut(text, middle), size_pt, bold=bold) <= width_pt:
            low = middle
        else:
            high = middle - 1
    return _cut(text, low)


def drawable(text: str) -> str:
    """Returns text with a box for each character that FONT lacks, which would be a warning while drawing."""
    return "".join(character if _has(character) else _MISSING for character in text)


def text_width_pt(text: str, size_pt: float, *, bold: bool = False) -> float:
    """Returns the width of drawable text, in points."""
    font = _font(bold)
    font.set_size(size_pt, 72)
    font.set_text(text)
    return font.get_width_height()[0] / 64


def _cut(text: str, length: int) -> str:
    return text[:length].rstrip() + "…"


@cache
def _has(character: str) -> bool:
    return all(_font(bold).get_char_index(ord(character)) for bold in (False, True))


def _font(bold: bool) -> FT2Font:
    return get_font(findfont(FontProperties(family=FONT, weight="bold" if bold else "normal")))
