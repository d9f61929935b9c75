"""What the two decoders share: the contract, and the plain reference that tests hold both to.

A decoder takes JPEG bytes and crop windows and gives uint8 patches; it draws nothing at random and knows nothing of
epochs, so either one gives every run the same crops.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .plan import Windows
from .tokens import Geometry, Positions, gather_patches

UNDECODABLE = "JPEG cannot be decoded"
OTHER_SIZE = "image is not of the size that was indexed"


@dataclass(frozen=True)
class Decoded:
    """Patches of a batch, and the slots that have none."""

    patches: torch.Tensor
    """uint8 [batch, tokens, patch*patch*3], contiguous; on the CPU, or on the GPU where that decoded. A bad slot holds
    zeros or a placeholder's pixels: no loss may read them."""
    faults: dict[int, str]
    """Slot -> reason."""


class Decoder(Protocol):
    """Not safe for several threads at once: each has its own."""

    def decode(
        self,
        jpegs: Sequence[bytes | None],
        windows: Windows,
        positions: Positions,
        widths: npt.NDArray[np.int32],
        heights: npt.NDArray[np.int32],
    ) -> Decoded:
        """Returns the kept patches of each image's window; None stands for a slot that has no image.

        windows: float64 [batch, 4] as plan.Windows, each resampled to geometry.decoded_size. positions: int16
        [batch, tokens], which patches of that are kept; not looked at where all are. widths, heights: int32 [batch],
        as the index has them.
        """
        ...


def reference(
    jpeg: bytes, window: npt.NDArray[np.float64], positions: Positions, geometry: Geometry
) -> npt.NDArray[np.uint8]:
    """Returns one image's patches the plain way: full decode, antialiased triangle filter of the fractional window.

    window: float64 [4], the whole crop. positions: int16 [tokens], on the geometry's grid; the crop is resampled whole
    and they are cut from that, for every reduction. uint8 [tokens, patch*patch*3]. Slow and exact to 1 of 255; the
    decoders are compared with it.
    """
    with Image.open(io.BytesIO(jpeg)) as image:
        size = (geometry.image_size, geometry.image_size)
        square = image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=crop_box(window, image))
    return gather_patches(np.asarray(square)[None], positions[None], geometry.patch)[0]


def crop_box(window: npt.NDArray[np.float64], image: Image.Image) -> tuple[float, float, float, float]:
    """Returns a window as Pillow's box: left, top, right, bottom, inside the image to the last bit."""
    left, top, width, height = window.tolist()
    return left, top, min(left + width, image.width), min(top + height, image.height)


def psnr(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Returns the peak signal-to-noise ratio of two uint8 arrays of one shape, in dB; 100 for equal ones."""
    error = float(np.mean((one.astype(np.float64) - other.astype(np.float64)) ** 2))
    return 100.0 if error == 0 else min(100.0, 10 * np.log10(255.0**2 / error))
