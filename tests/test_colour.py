"""Colour maps against the steps done one by one, and both devices' application of them against plain arithmetic."""

import numpy as np
import pytest
import torch

from pipeline.colour import ColourJitter, ColourMaps, apply_maps, colour_maps
from pipeline.philox import Stream, uniform

RECIPE = ColourJitter(jitter=0.8, greyscale=0.2)
LUMA = np.array([0.299, 0.587, 0.114])


def mapped(maps: ColourMaps, slot: int, pixels: np.ndarray) -> np.ndarray:
    return pixels @ maps.pixel[slot].T + maps.mean[slot] @ pixels.mean(axis=0)


def step_by_step(draws: np.ndarray, pixels: np.ndarray, colour: ColourJitter) -> np.ndarray:
    """The same augmentation, a step after the other, on float pixels [n, 3] that are never cut."""
    import itertools

    order = list(itertools.permutations(range(4)))[int(draws[4] * 24)]
    for step in order if draws[5] < colour.jitter else ():
        if step == 0:
            pixels = pixels * (1 + (2 * draws[0] - 1) * colour.brightness)
        elif step == 1:
            mean = pixels.mean(axis=0)
            pixels = mean + (1 + (2 * draws[1] - 1) * colour.contrast) * (pixels - mean)
        elif step == 2:
            grey = (pixels @ LUMA)[:, None]
            pixels = grey + (1 + (2 * draws[2] - 1) * colour.saturation) * (pixels - grey)
        else:
            angle = 2 * np.pi * (2 * draws[3] - 1) * colour.hue
            yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
            y, i, q = yiq @ pixels.T
            turned = np.stack([y, np.cos(angle) * i - np.sin(angle) * q, np.sin(angle) * i + np.cos(angle) * q])
            pixels = (np.linalg.inv(yiq) @ turned).T
    return np.repeat((pixels @ LUMA)[:, None], 3, axis=1) if draws[6] < colour.greyscale else pixels


def test_a_map_is_all_the_steps_in_one() -> None:
    ids = np.arange(300)
    maps = colour_maps(4, ids % 2, ids, RECIPE)
    draws = uniform(4, Stream.COLOUR, ids % 2, ids, 7)
    pixels = np.random.default_rng(0).uniform(0, 255, (50, 3))
    for slot in ids:
        expected = step_by_step(draws[slot], pixels, RECIPE)
        assert np.allclose(mapped(maps, int(slot), pixels), expected, atol=1e-6)


def test_shares_are_those_asked_for() -> None:
    ids = np.arange(20_000)
    maps = colour_maps(0, ids * 0, ids, RECIPE)
    greyed = np.isclose(maps.pixel[:, 0], maps.pixel[:, 1]).all(axis=1)
    untouched = (maps.pixel == np.eye(3)).all(axis=(1, 2))
    assert abs(greyed.mean() - 0.2) < 0.015
    assert abs(untouched.mean() - 0.2 * 0.8) < 0.015
    assert ColourJitter().changes_nothing
    assert not RECIPE.changes_nothing


def test_maps_depend_on_seed_epoch_and_sample_alone() -> None:
    ids = np.arange(60)
    whole = colour_maps(1, ids % 3, ids, RECIPE)
    part = colour_maps(1, ids[20:30] % 3, ids[20:30], RECIPE)
    assert (part.pixel == whole.pixel[20:30]).all()
    assert (colour_maps(1, ids % 3 + 1, ids, RECIPE).pixel != whole.pixel).any()


def test_applying_is_right_to_a_level_and_cuts_once() -> None:
    rng = np.random.default_rng(1)
    patches = rng.integers(0, 256, (40, 16, 768), np.uint8)
    ids = np.arange(40)
    maps = colour_maps(2, ids * 0, ids, ColourJitter(jitter=1, greyscale=0.2))
    found = apply_maps(torch.from_numpy(patches.copy()), maps).numpy()
    for slot in range(40):
        expected = mapped(maps, slot, patches[slot].reshape(-1, 3).astype(float))
        expected = np.clip(expected, 0, 255).reshape(patches[slot].shape)
        worst = np.abs(found[slot] - expected).max()
        assert worst < 1, f"off by {worst}"


def test_no_jitter_and_no_grey_leave_every_bit() -> None:
    patches = np.random.default_rng(1).integers(0, 256, (5, 4, 768), np.uint8)
    ids = np.arange(5)
    maps = colour_maps(2, ids * 0, ids, ColourJitter())
    assert (apply_maps(torch.from_numpy(patches.copy()), maps).numpy() == patches).all()


@pytest.mark.gpu
def test_a_gpu_gives_the_same_to_a_level() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    patches = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (40, 16, 768), np.uint8))
    ids = np.arange(40)
    maps = colour_maps(2, ids * 0, ids, RECIPE)
    on_gpu = apply_maps(patches.cuda(), maps).cpu()
    on_cpu = apply_maps(patches.clone(), maps)
    assert (on_gpu.int() - on_cpu.int()).abs().max() <= 1


def test_strengths_are_checked() -> None:
    with pytest.raises(ValueError, match=r"colour hue 0.7 is outside 0 to 0.5"):
        ColourJitter(hue=0.7)
    with pytest.raises(ValueError, match="colour jitter 2 is outside 0 to 1"):
        ColourJitter(jitter=2)
