"""Colour augmentation, drawn from the plan: jitter and greyscale as one affine map of a pixel's three channels.

A map is `A x + C m`: x a pixel, m the mean colour of the image's kept patches. Both matrices are pure functions of
(seed, epoch, sample), so they need no look at the image, and every step of a jitter is in them. Unlike applying the
steps one by one, values are cut to 0-255 once, at the end. About 20 us an image of 16 tokens, outside the GIL.
"""

from dataclasses import dataclass
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .philox import Stream, uniform

if TYPE_CHECKING:
    import torch

FloatArray = npt.NDArray[np.float64]

_LUMA = np.array([0.299, 0.587, 0.114])
# NTSC's YIQ: hue is an angle in its I-Q plane, brightness its Y.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_RGB = np.linalg.inv(_YIQ)
_ORDERS = np.array(list(permutations(range(4))))


@dataclass(frozen=True)
class ColourJitter:
    """How much colour varies. The recipes of CLIPA's larger models: jitter .8 with these strengths, greyscale .2."""

    jitter: float = 0.0
    """Share of the samples that are jittered."""
    brightness: float = 0.32
    """Factor drawn from 1 - x to 1 + x; so too contrast and saturation."""
    contrast: float = 0.32
    saturation: float = 0.32
    hue: float = 0.08
    """Turned by up to this share of a full turn, either way."""
    greyscale: float = 0.0
    """Share of the samples that lose their colour, after any jitter."""

    def __post_init__(self) -> None:
        limits = {"jitter": 1, "greyscale": 1, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}
        for name, limit in limits.items():
            if not 0 <= (value := getattr(self, name)) <= limit:
                raise ValueError(f"colour {name} {value} is outside 0 to {limit}; 0 turns it off")

    @property
    def changes_nothing(self) -> bool:
        return self.jitter == 0 and self.greyscale == 0


NO_JITTER = ColourJitter()


@dataclass(frozen=True)
class ColourMaps:
    """A map for each sample; y = pixel @ x + mean @ m, channels red, green, blue."""

    pixel: FloatArray
    """[batch, 3, 3]"""
    mean: FloatArray
    """[batch, 3, 3]"""


def colour_maps(
    seed: int, epoch: npt.NDArray[np.int64], sample_ids: npt.NDArray[np.int64], colour: ColourJitter
) -> ColourMaps:
    """Returns each sample's map. epoch, sample_ids: int64 [batch].

    Brightness, contrast (about the mean colour, as TensorFlow's), saturation (against luma, as torchvision's) and hue
    (turning the I-Q plane, as DALI's color_twist) in an order drawn anew; then greyscale.
    """
    draws = uniform(seed, Stream.COLOUR, epoch, sample_ids, 7)
    batch = len(sample_ids)
    strengths = np.array([colour.brightness, colour.contrast, colour.saturation])
    factors = 1 + (2 * draws[:, :3] - 1) * strengths
    turns = 2 * np.pi * (2 * draws[:, 3] - 1) * colour.hue
    order = _ORDERS[(draws[:, 4] * len(_ORDERS)).astype(np.int64)]
    identity = np.broadcast_to(np.eye(3), (batch, 3, 3))
    grey = np.broadcast_to(_LUMA, (batch, 3, 3))  # each row is luma
    brightness = factors[:, 0, None, None] * identity
    saturation = factors[:, 2, None, None] * identity + (1 - factors[:, 2, None, None]) * grey
    linear = np.stack([brightness, identity, saturation, _hue(turns)], axis=1)
    contrast = factors[:, 1, None, None]
    pixel, mean = identity.copy(), np.zeros((batch, 3, 3))
    at = np.arange(batch)
    for turn in range(4):
        step = linear[at, order[:, turn]]
        # Contrast c about the mean so far, (pixel + mean) m, which it leaves where it is.
        c = np.where((order[:, turn] == 1)[:, None, None], contrast, 1.0)
        pixel, mean = step @ (c * pixel), step @ (mean + (1 - c) * pixel)
    jittered = (draws[:, 5] < colour.jitter)[:, None, None]
    pixel, mean = np.where(jittered, pixel, identity), np.where(jittered, mean, 0.0)
    greyed = (draws[:, 6] < colour.greyscale)[:, None, None]
    return ColourMaps(np.where(greyed, grey @ pixel, pixel), np.where(greyed, grey @ mean, mean))


def apply_maps(patches: "torch.Tensor", maps: ColourMaps) -> "torch.Tensor":
    """Returns the patches with each sample's map applied, right to a level, cut to 0-255; on their own device.

    patches: uint8 [batch, tokens, patch*patch*3]; those of a CPU are changed in place.
    """
    # Only here: a command line is checked against this module before torch is there.
    import cv2
    import torch

    if patches.device.type == "cpu":
        pixels = patches.numpy()
        for slot in range(len(pixels)):
            image = pixels[slot].reshape(len(pixels[slot]), -1, 3)
            offset = maps.mean[slot] @ cv2.mean(image)[:3]
            cv2.transform(image, np.column_stack([maps.pixel[slot], offset]), image)
        return patches
    colours = patches.reshape(len(patches), -1, 3).float()
    pixel, mean = (torch.from_numpy(each).to(patches.device, torch.float32) for each in (maps.pixel, maps.mean))
    offset = torch.einsum("bij,bj->bi", mean, colours.mean(dim=1))[:, None]
    mapped = torch.baddbmm(offset.expand_as(colours), colours, pixel.transpose(1, 2))
    return mapped.round_().clamp_(0, 255).to(torch.uint8).reshape(patches.shape)


def _hue(turns: FloatArray) -> FloatArray:
    """float64 [batch, 3, 3]: RGB to RGB, the I-Q plane turned by `turns` radians."""
    turned = np.zeros((len(turns), 3, 3))
    turned[:, 0, 0] = 1
    turned[:, 1, 1] = turned[:, 2, 2] = np.cos(turns)
    turned[:, 1, 2], turned[:, 2, 1] = -np.sin(turns), np.sin(turns)
    return _RGB @ turned @ _YIQ
