"""Token geometry from one dial: --tokens, how they are reduced, and the image size come to a grid and what is decoded.

Pure; no pixel is touched but by `patchify` and `gather_patches`, which cut images into the patches of a grid.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

ImageReduction = Literal["resize", "random", "grid", "block"]

MASKED_IMAGE_SIZE = 224
"""Pixels a side where patches are masked and nobody says another."""
MAX_BLOCK_ASPECT = 2
"""A block may be as much wider than it is high: 98 of 196 patches are 7 rows of 14."""

Positions = npt.NDArray[np.int16]
"""int16 [batch, tokens]: row-major index of each kept patch on the grid, ascending in a sample."""


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
    decoded_grid: tuple[int, int]
    """(rows, columns) of patches that a decoder resamples: the block alone for `block`, else the whole grid."""
    grid_jitter: bool = False
    """`grid` only: which patches of a window are kept is drawn anew for each window, not the same for all."""

    @property
    def patch_values(self) -> int:
        """uint8 values of one flattened patch: row, column, channel."""
        return self.patch * self.patch * 3

    @property
    def decoded_size(self) -> tuple[int, int]:
        """(height, width) of what a decoder resamples, in pixels."""
        return self.decoded_grid[0] * self.patch, self.decoded_grid[1] * self.patch

    @property
    def keeps_all_decoded(self) -> bool:
        """Whether every patch that is resampled is kept, so that nothing is left to gather."""
        return self.decoded_grid[0] * self.decoded_grid[1] == self.tokens

    def unmasked(self) -> "Geometry":
        """Returns the geometry of the same grid with every patch kept, as evaluation sees images."""
        tokens = self.grid[0] * self.grid[1]
        return replace(self, image_reduction="resize", tokens=tokens, decoded_grid=self.grid, grid_jitter=False)


def token_geometry(
    tokens: int,
    *,
    image_reduction: ImageReduction = "resize",
    image_size: int | None = None,
    patch: int = 16,
    grid_jitter: bool = False,
) -> Geometry:
    """Returns the geometry that keeps `tokens` image tokens.

    `resize`: a square grid of sqrt(tokens) patches a side, so 16 tokens at patch 16 are 64 x 64 pixels.
    `random`, `grid`, `block`: the image stays at image_size (default 224) and `tokens` of its patches are kept.
    Raises ValueError, naming the nearest that can be, where the values cannot go together.
    """
    if patch < 1:
        raise ValueError(f"a patch of {patch} pixels a side is no patch; give at least 1")
    if tokens < 1:
        raise ValueError(f"--tokens {tokens} is below 1; the smallest is --tokens 1")
    if tokens > np.iinfo(np.int16).max:
        raise ValueError(f"--tokens {tokens} exceeds the {np.iinfo(np.int16).max} that a position can count; lower it")
    if grid_jitter and image_reduction != "grid":
        raise ValueError(f"--grid-jitter is for --image-reduction grid, not {image_reduction}; leave one of them out")
    if image_reduction == "resize":
        side = _resized_side(tokens, image_size, patch)
    else:
        side = _masked_side(tokens, MASKED_IMAGE_SIZE if image_size is None else image_size, patch)
    decoded = (side, side)
    if image_reduction == "grid":
        _check_grid(tokens, side)
    elif image_reduction == "block":
        decoded = _block(tokens, side)
    return Geometry(image_reduction, tokens, patch, side * patch, (side, side), decoded, grid_jitter)


def _resized_side(tokens: int, image_size: int | None, patch: int) -> int:
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
    return side


def _masked_side(tokens: int, image_size: int, patch: int) -> int:
    side = image_size // patch
    if side < 1:
        raise ValueError(f"--image-size {image_size} is below one patch; the smallest is {patch}")
    if side * patch != image_size:
        raise ValueError(
            f"--image-size {image_size} is no multiple of patch {patch}; the nearest are {side * patch} "
            f"and {(side + 1) * patch}"
        )
    if side * side > np.iinfo(np.int16).max:
        raise ValueError(
            f"--image-size {image_size} makes {side * side} patches, more than the {np.iinfo(np.int16).max} that a "
            f"position can count; the largest is {math.isqrt(np.iinfo(np.int16).max) * patch}"
        )
    if tokens > side * side:
        raise ValueError(
            f"--tokens {tokens} exceeds the {side * side} patches of a {image_size}-pixel image at patch {patch}; "
            "lower --tokens or raise --image-size"
        )
    return side


def _check_grid(tokens: int, side: int) -> None:
    allowed = (side * side // 4, side * side // 2)
    if side % 2:
        raise ValueError(f"grid reduction needs an even number of patches a side, not {side}; change --image-size")
    if tokens not in allowed:
        raise ValueError(
            f"--tokens {tokens} is not 1/4 or 1/2 of the {side * side} patches, which grid reduction keeps; "
            f"the nearest are {allowed[0]} and {allowed[1]}"
        )


def _block(tokens: int, side: int) -> tuple[int, int]:
    """The (rows, columns) of a block of so many patches, as near a square as can be and no higher than wide."""
    if (shape := _block_shape(tokens, side)) is not None:
        return shape
    below = next(number for number in range(tokens, 0, -1) if _block_shape(number, side))
    above = next(number for number in range(tokens, side * side + 1) if _block_shape(number, side))
    raise ValueError(
        f"--tokens {tokens} makes no block at most {MAX_BLOCK_ASPECT} times as wide as high in {side} x {side} "
        f"patches; the nearest are {below} and {above}"
    )


def _block_shape(tokens: int, side: int) -> tuple[int, int] | None:
    for rows in range(min(math.isqrt(tokens), side), 0, -1):
        columns, rest = divmod(tokens, rows)
        if rest == 0:
            return (rows, columns) if columns <= min(side, MAX_BLOCK_ASPECT * rows) else None
    return None


def patchify(pixels: npt.NDArray[np.uint8], patch: int) -> npt.NDArray[np.uint8]:
    """Cuts images into flattened patches, row-major over the grid; inside a patch: row, column, channel.

    pixels: uint8 [batch, height, width, 3]. Returns uint8 [batch, patches, patch*patch*3], contiguous.
    """
    batch, height, width = pixels.shape[:3]
    rows, columns = height // patch, width // patch
    cut = pixels.reshape(batch, rows, patch, columns, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, rows * columns, patch * patch * 3)


def gather_patches(pixels: Any, positions: Any, patch: int) -> Any:
    """Returns the patches of images that stand at `positions`, in that order: rows of what `patchify` gives.

    pixels: uint8 [batch, height, width, 3]; positions: integers [batch, tokens]; both NumPy arrays, or both tensors of
    one device. Returns uint8 [batch, tokens, patch*patch*3], contiguous. Only kept patches are copied.
    """
    batch, height, width = pixels.shape[:3]
    rows, columns = height // patch, width // patch
    cut = pixels.reshape(batch, rows, patch, columns, patch, 3)
    if isinstance(pixels, np.ndarray):
        image = np.arange(batch)
    else:
        # Only here: a command line is checked against this module before torch is there.
        import torch

        image = torch.arange(batch, device=pixels.device)
    # Indices on both sides of a slice put the indexed axes first: [batch, tokens, patch, patch, 3].
    kept = cut[image[:, None], positions // columns, :, positions % columns]
    return kept.reshape(batch, positions.shape[1], patch * patch * 3)
