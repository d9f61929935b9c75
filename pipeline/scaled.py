"""The size of a scaled decode, for all that ask libjpeg-turbo for one. Alone here, so that copying needs no torch."""

from typing import Any, TypeVar

import numpy.typing as npt

Side = TypeVar("Side", int, npt.NDArray[Any])


def scaled_side(side: Side, eighths: Side) -> Side:
    """Returns a side of an image decoded at n/8 of full size, in pixels: libjpeg rounds up.

    Each an int, or int32 or int64 [batch]. Asked for just this size, simplejpeg chooses just that scale.
    """
    return (side * eighths + 7) // 8
