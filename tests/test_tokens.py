import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tokens import CropRange, crop_windows, patchify, token_geometry, whole_windows


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
    with pytest.raises(ValueError, match="crop area"):
        CropRange(area=(0.5, 1.5))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**40))
def test_windows_lie_inside_the_image_and_keep_the_ranges(width: int, height: int, seed: int) -> None:
    ids = np.arange(64)
    crop = CropRange()
    windows = crop_windows(seed, ids * 0, ids, np.full(64, width, np.int32), np.full(64, height, np.int32), crop)
    left, top, w, h = windows.T
    assert (left >= 0).all()
    assert (top >= 0).all()
    assert (left + w <= width * (1 + 1e-12)).all()
    assert (top + h <= height * (1 + 1e-12)).all()
    if max(width, height) * crop.ratio[0] <= min(width, height):  # else the centred fallback may be smaller
        assert (w * h >= crop.area[0] * width * height * (1 - 1e-9)).all()
    assert (w / h >= crop.ratio[0] * (1 - 1e-9)).all()
    assert (w / h <= crop.ratio[1] * (1 + 1e-9)).all()


def test_windows_change_with_the_epoch_and_cover_the_range() -> None:
    ids = np.arange(4000)
    side = np.full(4000, 128, np.int32)
    first, second = (crop_windows(5, np.full(4000, epoch), ids, side, side, CropRange()) for epoch in (0, 1))
    assert (first != second).any(axis=1).mean() > 0.99
    share = first[:, 2] * first[:, 3] / 128**2
    assert share.min() < 0.41
    assert share.max() > 0.98
    assert (whole_windows(side, side)[0] == [0, 0, 128, 128]).all()


def test_patchify_is_the_grid_cut() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 48, 48, 3), np.uint8)
    patches = patchify(pixels, 16)
    assert patches.shape == (2, 9, 768)
    assert patches.flags.c_contiguous
    for position in range(9):
        row, column = divmod(position, 3)
        cut = pixels[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        assert (patches[:, position].reshape(2, 16, 16, 3) == cut).all()
