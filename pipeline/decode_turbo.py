"""The CPU fast path: libjpeg-turbo decodes at n/8 of full size, one bilinear warp cuts the fractional window from that.

The scaled decode is the antialiasing filter: it leaves out the frequencies that the small image could not show, and the
warp's own ratio stays below 8/5. About 165 us for a 128 px JPEG at 16 tokens; the GIL is let go in both calls.
"""

from collections.abc import Sequence

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from .decode import OTHER_SIZE, UNDECODABLE, Decoded
from .jpeg import damage, is_warning
from .plan import Windows
from .scaled import scaled_side
from .tokens import Geometry, Positions, gather_patches, patchify

# Threads are the loader's; OpenCV's own pool would only add hand-overs to calls of 50 us.
cv2.setNumThreads(1)

_WARP = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP


class TurboDecoder:
    """libjpeg-turbo through simplejpeg, OpenCV for the warp. Stateless, so one may serve many threads."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry

    def decode(
        self,
        jpegs: Sequence[bytes | None],
        windows: Windows,
        positions: Positions,
        widths: npt.NDArray[np.int32],
        heights: npt.NDArray[np.int32],
    ) -> Decoded:
        """See decode.Decoder."""
        height, width = size = self.geometry.decoded_size
        eighths = scale_eighths(windows, size)
        rows, columns = (scaled_side(side, eighths).tolist() for side in (heights, widths))
        maps = _warp_maps(windows, eighths / 8, size)
        pixels = np.zeros((len(jpegs), height, width, 3), np.uint8)
        faults: dict[int, str] = {}
        for slot, jpeg in enumerate(jpegs):
            if jpeg is None:
                continue
            try:
                scaled = _scaled(jpeg, rows[slot], columns[slot])
            except Exception:  # simplejpeg raises ValueError, and KeyError for what libjpeg does not know
                faults[slot] = UNDECODABLE
                continue
            if scaled.shape[0] != rows[slot] or scaled.shape[1] != columns[slot]:
                faults[slot] = OTHER_SIZE
                continue
            cv2.warpAffine(scaled, maps[slot], (width, height), pixels[slot], _WARP, cv2.BORDER_REPLICATE)
        patch = self.geometry.patch
        kept = patchify(pixels, patch) if self.geometry.keeps_all_decoded else gather_patches(pixels, positions, patch)
        return Decoded(torch.from_numpy(kept), faults)


def _scaled(jpeg: bytes, rows: int, columns: int) -> npt.NDArray[np.uint8]:
    try:
        # Positional: keywords cost 1 us of the GIL.
        return simplejpeg.decode_jpeg(jpeg, "RGB", True, True, rows, columns, 1, None, True)
    except ValueError as error:
        # DALI is kept from what is damaged, and both refuse the same; nearly all of that makes libjpeg warn.
        if not is_warning(error) or damage(jpeg):
            raise
        # Past damaged bits DALI too reads on. Not asked for at first: it hides errors that come after, see jpeg.py.
        return simplejpeg.decode_jpeg(jpeg, "RGB", True, True, rows, columns, 1, None, False)


def scale_eighths(windows: Windows, size: tuple[int, int]) -> npt.NDArray[np.int64]:
    """Returns the smallest n of 1..6, 8 for which each window at n/8 of full size still covers `size` (height, width).

    Never 7: libjpeg-turbo has no fast transform of that size, and takes twice as long as for the whole image.
    """
    needed = 8 * np.maximum(size[1] / windows[:, 2], size[0] / windows[:, 3])
    # A window of exactly the size must not ask for more because of its last bit.
    eighths = np.clip(np.ceil(needed - 1e-9), 1, 8).astype(np.int64)
    return np.where(eighths == 7, 8, eighths)


def _warp_maps(windows: Windows, scale: npt.NDArray[np.float64], size: tuple[int, int]) -> npt.NDArray[np.float64]:
    """float64 [batch, 2, 3]: from pixels of the output to pixels of the scaled image; centres lie at +0.5."""
    maps = np.zeros((len(windows), 2, 3))
    step = windows[:, 2:] * scale[:, None] / np.array(size[::-1])
    maps[:, 0, 0], maps[:, 1, 1] = step[:, 0], step[:, 1]
    maps[:, :, 2] = windows[:, :2] * scale[:, None] + step / 2 - 0.5
    return maps
