"""What the seed decides of each sample: crop window, kept patches, which caption. (seed, epoch, sample) -> numbers.

Pure functions over a whole batch, so that decoders, threads, ranks and a resumed run all see the same; no pixel is
touched here. Windows are fractional, in pixels of the stored image.
"""

import functools
import math
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt

from .philox import Stream, uniform
from .tokens import Geometry, Positions

IntArray = npt.NDArray[np.int64]

# As torchvision's RandomResizedCrop: draws per crop before the centre is taken instead.
_CROP_TRIES = 10


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
    epoch: IntArray,
    sample_ids: IntArray,
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


def kept_positions(seed: int, epoch: IntArray, sample_ids: IntArray, geometry: Geometry) -> Positions:
    """Returns which patches of the grid each sample keeps, int16 [batch, tokens], ascending.

    `random`: any, without replacement. `grid`: the upper left patch of each 2 x 2 window (1/4) or its diagonal (1/2),
    or with grid_jitter any one or two of each. `block`: one block whose place is uniform. epoch, sample_ids: [batch].
    """
    draw = functools.partial(uniform, seed, Stream.KEPT, epoch, sample_ids)
    rows, columns = geometry.grid
    if geometry.image_reduction == "random" and not geometry.keeps_all_decoded:
        # The places of the smallest of as many uniform numbers as there are patches. Stable: a tie must not fall by
        # which instructions the CPU has.
        kept = np.argsort(draw(rows * columns), axis=1, kind="stable")[:, : geometry.tokens]
        return np.sort(kept.astype(np.int16), axis=1)
    if geometry.image_reduction == "grid":
        choices = _window_choices(geometry)
        if not geometry.grid_jitter:
            return np.broadcast_to(np.sort(choices[0]), (len(sample_ids), geometry.tokens)).copy()
        picks = (draw(rows * columns // 4) * len(choices)).astype(np.int64)
        per_window = choices.reshape(len(choices), rows * columns // 4, -1)
        kept = per_window[picks, np.arange(rows * columns // 4)]
        return np.sort(kept.reshape(len(sample_ids), -1), axis=1)
    if geometry.image_reduction == "block":
        high, wide = geometry.decoded_grid
        spare = np.array([rows - high + 1, columns - wide + 1])
        corner = (draw(2) * spare).astype(np.int64)
        inside = (np.arange(high)[:, None] * columns + np.arange(wide)).ravel()
        return ((corner @ np.array([columns, 1]))[:, None] + inside).astype(np.int16)
    return np.broadcast_to(np.arange(geometry.tokens, dtype=np.int16), (len(sample_ids), geometry.tokens)).copy()


@functools.lru_cache(maxsize=16)
def _window_choices(geometry: Geometry) -> Positions:
    """int16 [choices, tokens]: the positions kept when every 2 x 2 window keeps the same of its four patches.

    Window by window, row-major. Choice 0 is the published lattice: the upper left patch, or for two the diagonal.
    """
    rows, columns = geometry.grid
    windows = rows * columns // 4
    offsets = (0, columns + 1, 1, columns)
    sets = [[offsets[i] for i in each] for each in combinations(range(4), geometry.tokens // windows)]
    corners = (np.arange(0, rows, 2)[:, None] * columns + np.arange(0, columns, 2)).ravel()
    return np.array([(corners[:, None] + each).ravel() for each in sets], np.int16)


def decoded_windows(windows: Windows, positions: Positions, geometry: Geometry) -> Windows:
    """Returns the part of each crop that a decoder must look at, float64 [batch, 4]: the block's for `block`, else all.

    The grid is laid over the crop, so a block is a smaller window of it, to a fraction of a pixel.
    """
    if geometry.decoded_grid == geometry.grid:
        return windows
    rows, columns = geometry.grid
    high, wide = geometry.decoded_grid
    row, column = np.divmod(positions[:, 0].astype(np.int64), columns)
    patch_width, patch_height = windows[:, 2] / columns, windows[:, 3] / rows
    return np.stack(
        [
            windows[:, 0] + column * patch_width,
            windows[:, 1] + row * patch_height,
            wide * patch_width,
            high * patch_height,
        ],
        axis=1,
    )


def caption_choice(seed: int, epoch: IntArray, sample_ids: IntArray, num_captions: IntArray) -> IntArray:
    """Returns which of its captions each sample shows this epoch, evenly drawn; int64 [batch], as every argument."""
    draws = uniform(seed, Stream.CAPTION, epoch, sample_ids, 1)[:, 0]
    return (draws * num_captions).astype(np.int64)
