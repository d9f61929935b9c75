import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.plan import CropRange, crop_windows, decoded_windows, kept_positions, whole_windows
from pipeline.tokens import ImageReduction, token_geometry


def test_crop_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="crop area"):
        CropRange(area=(0.5, 1.5))


@settings(max_examples=50)
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


GEOMETRIES = {
    "resize": token_geometry(16),
    "random 16": token_geometry(16, image_reduction="random"),
    "random 98": token_geometry(98, image_reduction="random"),
    "random all": token_geometry(196, image_reduction="random"),
    "grid 1/4": token_geometry(49, image_reduction="grid"),
    "grid 1/2": token_geometry(98, image_reduction="grid"),
    "grid 1/4 jitter": token_geometry(49, image_reduction="grid", grid_jitter=True),
    "grid 1/2 jitter": token_geometry(98, image_reduction="grid", grid_jitter=True),
    "block": token_geometry(49, image_reduction="block"),
    "wide block": token_geometry(98, image_reduction="block"),
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_kept_positions_are_different_places_of_the_grid_in_order(name: str) -> None:
    geometry = GEOMETRIES[name]
    ids = np.arange(500)
    positions = kept_positions(7, ids * 0, ids, geometry)
    assert positions.shape == (500, geometry.tokens)
    assert positions.dtype == np.int16
    assert positions.flags.c_contiguous
    assert positions.min() >= 0
    assert positions.max() < geometry.grid[0] * geometry.grid[1]
    assert (np.diff(positions, axis=1) > 0).all()


@pytest.mark.parametrize("name", GEOMETRIES)
def test_kept_positions_depend_on_seed_epoch_and_sample_alone(name: str) -> None:
    geometry = GEOMETRIES[name]
    ids = np.arange(100)
    epoch = ids % 3
    whole = kept_positions(7, epoch, ids, geometry)
    part = slice(30, 47)
    assert (kept_positions(7, epoch[part], ids[part], geometry) == whole[part]).all()
    drawn = name not in ("resize", "random all", "grid 1/4", "grid 1/2")
    assert bool((kept_positions(8, epoch, ids, geometry) != whole).any()) == drawn
    assert bool((kept_positions(7, epoch + 1, ids, geometry) != whole).any()) == drawn


@pytest.mark.parametrize("name", ["random 16", "random 98", "grid 1/4 jitter", "grid 1/2 jitter"])
def test_every_patch_is_kept_equally_often(name: str) -> None:
    geometry = GEOMETRIES[name]
    ids = np.arange(20_000)
    counts = np.bincount(kept_positions(3, ids * 0, ids, geometry).ravel(), minlength=196)
    share = geometry.tokens / 196
    deviation = np.sqrt(len(ids) * share * (1 - share))
    assert np.abs(counts - len(ids) * share).max() < 5 * deviation


@pytest.mark.parametrize(("name", "per_window"), [("grid 1/4", 1), ("grid 1/2", 2)])
@pytest.mark.parametrize("jitter", [False, True])
def test_grid_keeps_as_many_of_each_window(name: str, per_window: int, jitter: bool) -> None:
    ids = np.arange(300)
    positions = kept_positions(1, ids * 0, ids, GEOMETRIES[name + " jitter" * jitter]).astype(int)
    rows, columns = np.divmod(positions, 14)
    window = rows // 2 * 7 + columns // 2
    assert (np.sort(window, axis=1) == np.repeat(np.arange(49), per_window)).all()
    if not jitter:
        assert (rows[:, 0] == 0).all()
        assert ((rows + columns) % 2 == 0).all()
    if not jitter and per_window == 1:
        assert (rows % 2 == 0).all()


def test_a_block_is_a_rectangle_that_may_lie_anywhere() -> None:
    ids = np.arange(5000)
    positions = kept_positions(1, ids * 0, ids, GEOMETRIES["wide block"]).astype(int)
    rows, columns = np.divmod(positions, 14)
    assert (rows.max(axis=1) - rows.min(axis=1) == 6).all()
    assert (columns.max(axis=1) - columns.min(axis=1) == 13).all()
    counts = np.bincount(rows.min(axis=1))
    assert len(counts) == 8
    assert counts.min() > 0.8 * len(ids) / 8


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_decoded_window_is_the_kept_part_of_the_crop(name: str) -> None:
    geometry = GEOMETRIES[name]
    ids = np.arange(50)
    side = np.full(50, 640, np.int32)
    crops = crop_windows(2, ids * 0, ids, side, side, CropRange())
    positions = kept_positions(2, ids * 0, ids, geometry)
    windows = decoded_windows(crops, positions, geometry)
    rows, columns = geometry.grid
    if not name.endswith("block"):
        assert windows is crops
        return
    for crop, window, kept in zip(crops, windows, positions.astype(int), strict=True):
        row, column = divmod(kept[0], columns)
        last_row, last_column = divmod(kept[-1], columns)
        left, top = crop[0] + column * crop[2] / columns, crop[1] + row * crop[3] / rows
        right = crop[0] + (last_column + 1) * crop[2] / columns
        bottom = crop[1] + (last_row + 1) * crop[3] / rows
        assert np.allclose(window, [left, top, right - left, bottom - top])


def test_reductions_share_crops() -> None:
    """A strategy changes what is kept of a crop, never the crop: strategies can be compared on the same pictures."""
    ids = np.arange(64)
    side = np.full(64, 300, np.int32)
    crops = crop_windows(5, ids * 0, ids, side, side, CropRange())
    reductions: list[ImageReduction] = ["random", "grid"]
    for reduction in reductions:
        geometry = token_geometry(49, image_reduction=reduction)
        assert (decoded_windows(crops, kept_positions(5, ids * 0, ids, geometry), geometry) == crops).all()
