import numpy as np
import pytest
import torch

from pipeline.tokens import ImageReduction, gather_patches, patchify, token_geometry


@pytest.mark.parametrize(
    ("patch", "tokens", "image_size"),
    [(16, 16, 64), (16, 49, 112), (16, 36, 96), (16, 196, 224), (14, 36, 84), (14, 25, 70), (14, 256, 224)],
)
def test_published_sizes(patch: int, tokens: int, image_size: int) -> None:
    geometry = token_geometry(tokens, patch=patch)
    assert geometry.image_size == image_size
    assert geometry.grid[0] * geometry.grid[1] == tokens
    assert token_geometry(tokens, patch=patch, image_size=image_size) == geometry


def test_what_cannot_be_names_the_nearest_that_can() -> None:
    with pytest.raises(ValueError, match=r"--tokens 17 .* 16 \(64 px\) and 25 \(80 px\)"):
        token_geometry(17)
    with pytest.raises(ValueError, match="--image-size 224 contradicts --tokens 16, which is 64 px"):
        token_geometry(16, image_size=224)
    with pytest.raises(ValueError, match="--tokens 0 is below 1"):
        token_geometry(0)


@pytest.mark.parametrize(
    ("reduction", "tokens", "image_size", "message"),
    [
        ("random", 300, None, "--tokens 300 exceeds the 196 patches of a 224-pixel image at patch 16; lower"),
        ("random", 49, 220, "--image-size 220 is no multiple of patch 16; the nearest are 208 and 224"),
        ("random", 49, 0, "--image-size 0 is below one patch; the smallest is 16"),
        ("random", 49, 2912, "--image-size 2912 makes 33124 patches, more than the 32767 .* the largest is 2896"),
        ("grid", 50, None, "--tokens 50 is not 1/4 or 1/2 of the 196 patches.*; the nearest are 49 and 98"),
        ("grid", 56, 240, "an even number of patches a side, not 15"),
        ("block", 17, None, "--tokens 17 makes no block .* in 14 x 14 patches; the nearest are 16 and 18"),
        ("block", 98, 160, "--tokens 98 makes no block|--tokens 98 .* nearest are 90 and 100"),
    ],
)
def test_masks_that_cannot_be_name_the_nearest_that_can(
    reduction: ImageReduction, tokens: int, image_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        token_geometry(tokens, image_reduction=reduction, image_size=image_size)


def test_jitter_is_for_grid_alone() -> None:
    with pytest.raises(ValueError, match="--grid-jitter is for --image-reduction grid, not block"):
        token_geometry(49, image_reduction="block", grid_jitter=True)


@pytest.mark.parametrize(
    ("tokens", "block"), [(49, (7, 7)), (36, (6, 6)), (16, (4, 4)), (98, (7, 14)), (196, (14, 14))]
)
def test_blocks_are_near_square(tokens: int, block: tuple[int, int]) -> None:
    geometry = token_geometry(tokens, image_reduction="block")
    assert geometry.decoded_grid == block
    assert geometry.grid == (14, 14)
    assert geometry.keeps_all_decoded


@pytest.mark.parametrize("reduction", ["random", "grid", "block"])
def test_evaluation_sees_the_whole_grid(reduction: ImageReduction) -> None:
    masked, whole = token_geometry(49, image_reduction=reduction), token_geometry(196)
    assert masked.unmasked() == whole
    assert whole.unmasked() == whole


def test_patchify_is_the_grid_cut() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    patches = patchify(pixels, 16)
    assert patches.shape == (2, 9, 768)
    assert patches.flags.c_contiguous
    for position in range(9):
        row, column = divmod(position, 3)
        cut = pixels[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert (patches[:, position].reshape(2, 16, 16, 3) == cut).all()


@pytest.mark.parametrize("as_tensor", [False, True])
def test_gathering_is_patchify_then_choice(as_tensor: bool) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (3, 64, 96, 3), np.uint8)
    positions = rng.integers(0, 24, (3, 7)).astype(np.int16)
    expected = np.take_along_axis(patchify(pixels, 16), positions[..., None].astype(np.int64), axis=1)
    if as_tensor:
        found = gather_patches(torch.from_numpy(pixels), torch.from_numpy(positions.astype(np.int64)), 16).numpy()
    else:
        found = gather_patches(pixels, positions, 16)
    assert (found == expected).all()
    assert found.flags.c_contiguous
