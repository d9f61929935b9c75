"""The token plan: one dial (--tokens) -> geometry; (seed, epoch, sample) -> the window of the image that is trained on.

Pure functions over a whole batch; no pixel is touched here. Windows are fractional, in pixels of the stored image.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .philox import Stream, uniform

ImageReduction = Literal["resize"]

# As torchvision's RandomResizedCrop: draws per crop before the centre is taken instead.
_CROP_TRIES = 10


@dataclass(frozen=True)
class Geometry:
    """What `--tokens` comes to. The encoder's own class token is not counted."""

    image_reduction: ImageReduction
    tokens: int
    """Image tokens kept per image."""
    patch: int
    """Side of a patch, in pixels."""
    image_size: int
    """Side of the square that the crop is resampled to, in pixels."""
    grid: tuple[int, int]
    """(rows, columns) of patches that positions index."""

    @property
    def patch_values(self) -> int:
        """uint8 values of one flattened patch: row, column, channel."""
        return self.patch * self.patch * 3


def token_geometry(
    tokens: int, *, image_reduction: ImageReduction = "resize", image_size: int | None = None, patch: int = 16
) -> Geometry:
    """Returns the geometry that keeps `tokens` image tokens.

    `resize`: a square grid of sqrt(tokens) patches a side, so 16 tokens at patch 16 are 64 x 64 pixels.
    Raises ValueError, naming the nearest that can be, where tokens or image_size cannot.
    """
    if tokens < 1:
        raise ValueError(f"--tokens {tokens} is below 1; the smallest is --tokens 1")
    if tokens > np.iinfo(np.int16).max:
        raise ValueError(f"--tokens {tokens} exceeds the {np.iinfo(np.int16).max} that a position can count; lower it")
    side = math.isqrt(tokens)
    if side * side != tokens:
        below, above = side * side, (side + 1) ** 2
        raise ValueError(
            f"--tokens {tokens} is no square number, which resizing needs; the nearest are {below} "
            f"({side * patch} px) and {above} ({(side + 1) * patch} px)"
        )
    if image_size is not None and image_size != side * patch:
        raise ValueError(
            f"--image-size {image_size} contradicts --tokens {tokens}, which is {side * patch} px at patch {patch}; "
            "leave --image-size out"
        )
    return Geometry(image_reduction, tokens, patch, side * patch, (side, side))


@dataclass(frozen=True)
class CropRange:
    """Random resized crop: what share of the image's area, and which width/height ratios."""

    area: tuple[float, float] = (0.4, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __post_init__(self) -> None:
        for name, (low, high), limit in (("area", self.area, 1.0), ("ratio", self.ratio, math.inf)):
            if not 0 < low <= high <= limit:
                raise ValueError(f"crop {name} {low} {high} is not 0 < low <= high <= {limit:g}; give it as low high")


DEFAULT_CROP = CropRange()
"""CLIPA's: 40 to 100 % of the area, 3/4 to 4/3."""

Windows = npt.NDArray[np.float64]
"""float64 [batch, 4]: left, top, width, height of each crop, in pixels of the stored image; inside the image."""


def whole_windows(widths: npt.NDArray[np.int32], heights: npt.NDArray[np.int32]) -> Windows:
    """Returns the windows that take in the whole image, for evaluation. widths, heights: [batch], in pixels."""
    zeros = np.zeros(len(widths))
    return np.stack([zeros, zeros, widths.astype(np.float64), heights.astype(np.float64)], axis=1)


def crop_windows(
    seed: int,
    epoch: npt.NDArray[np.int64],
    sample_ids: npt.NDArray[np.int64],
    widths: npt.NDArray[np.int32],
    heights: npt.NDArray[np.int32],
    crop: CropRange,
) -> Windows:
    """Returns one random crop a sample, a pure function of (seed, epoch, sample).

    Area uniform in crop.area times the image's, log-ratio uniform; the first of ten draws that fits is taken, else the
    largest centred window within the ratios (torchvision's rule). Unlike there, windows are not rounded to pixels.
    epoch, sample_ids: int64 [batch]; widths, heights: int32 [batch], in pixels.
    """
    draws = uniform(seed, Stream.CROP, epoch, sample_ids, 2 + 2 * _CROP_TRIES)
    image_width, image_height = widths.astype(np.float64), heights.astype(np.float64)
    low, high = crop.area
    area = (low + (high - low) * draws[:, 2::2]) * (image_width * image_height)[:, None]
    log_low, log_high = math.log(crop.ratio[0]), math.log(crop.ratio[1])
    ratio = np.exp(log_low + (log_high - log_low) * draws[:, 3::2])
    width, height = np.sqrt(area * ratio), np.sqrt(area / ratio)
    fits = (width <= image_width[:, None]) & (height <= image_height[:, None])
    first = fits.argmax(axis=1)[:, None]
    found = np.take_along_axis(fits, first, axis=1)[:, 0]
    fallback_width = np.minimum(image_width, image_height * crop.ratio[1])
    fallback_height = np.minimum(image_height, image_width / crop.ratio[0])
    window_width = np.where(found, np.take_along_axis(width, first, axis=1)[:, 0], fallback_width)
    window_height = np.where(found, np.take_along_axis(height, first, axis=1)[:, 0], fallback_height)
    across = np.where(found, draws[:, 0], 0.5)
    down = np.where(found, draws[:, 1], 0.5)
    return np.stack(
        [across * (image_width - window_width), down * (image_height - window_height), window_width, window_height],
        axis=1,
    )


def caption_choice(
    seed: int, epoch: npt.NDArray[np.int64], sample_ids: npt.NDArray[np.int64], num_captions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Returns which of its captions each sample shows this epoch, evenly drawn; int64 [batch], as every argument."""
    draws = uniform(seed, Stream.CAPTION, epoch, sample_ids, 1)[:, 0]
    return (draws * num_captions).astype(np.int64)


def patchify(pixels: npt.NDArray[np.uint8], patch: int) -> npt.NDArray[np.uint8]:
    """Cuts images into flattened patches, row-major over the grid; inside a patch: row, column, channel.

    pixels: uint8 [batch, size, size, 3]. Returns uint8 [batch, (size/patch)**2, patch*patch*3], contiguous.
    """
    batch, size = pixels.shape[:2]
    side = size // patch
    cut = pixels.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, side * side, patch * patch * 3)
