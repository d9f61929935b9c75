from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.preview import Preview, look, main, masked_patch, placed
from pipeline.tokens import ImageReduction, gather_patches, token_geometry


@pytest.mark.parametrize("reduction", ["resize", "random", "grid", "block"])
def test_patches_stand_at_their_places(reduction: ImageReduction) -> None:
    rng = np.random.default_rng(0)
    geometry = token_geometry(16, image_reduction=reduction, image_size=None if reduction == "resize" else 128)
    positions = np.sort(rng.permutation(geometry.grid[0] * geometry.grid[1])[:16]).astype(np.int16)
    patches = rng.integers(0, 200, (16, geometry.patch_values), np.uint8)
    sheet = placed(patches, positions, geometry)
    assert sheet.shape == (geometry.image_size, geometry.image_size, 3)
    assert (gather_patches(sheet[None], positions[None], geometry.patch)[0] == patches).all()
    masked = np.setdiff1d(np.arange(geometry.grid[0] * geometry.grid[1]), positions).astype(np.int16)
    assert (gather_patches(sheet[None], masked[None], geometry.patch)[0] == masked_patch(geometry.patch).ravel()).all()


@pytest.mark.parametrize("reduction", ["resize", "random", "grid", "block"])
def test_what_is_seen_lies_inside_the_crop(shards: Path, reduction: ImageReduction) -> None:
    size = None if reduction == "resize" else 128
    seen = look(Preview(str(shards), image_reduction=reduction, image_size=size, text_tokens=5, samples=4))
    assert len(seen) == 4
    for sample in seen:
        left, top, width, height = sample.window
        assert left + width <= sample.picture.shape[1] + 1e-6
        assert top + height <= sample.picture.shape[0] + 1e-6
        assert 1 <= len(sample.pieces) <= 4
        # The crop, made by Pillow, and the kept patches, made by the decoder, are the same picture.
        side = sample.kept.shape[0]
        crop = np.asarray(Image.fromarray(sample.crop).resize((side, side))).astype(float)
        kept = (sample.kept != np.tile(masked_patch(16), (side // 16, side // 16, 1))).any(axis=2)
        assert np.abs(crop[kept] - sample.kept[kept]).mean() < 12


def test_the_sheet_is_written(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sheets" / "preview.png"
    assert main([str(shards), "--samples", "2", "--text-tokens", "5", "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.width > 900
    assert "2 samples at 16 image and 5 text tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "17"], "--tokens 17 is no square number"),
        (["--samples", "99"], "--samples 99 is outside 1 to 32"),
        (["--patch", "0"], "--patch 0 is below 1"),
        (["--patch", "-4"], "--patch -4 is below 1"),
        (["--seed", "-1"], "--seed -1 is outside 0 to 2**63 - 1"),
        (
            ["--tokenizer", "bpe", "--vocabulary", "nowhere"],
            "nowhere is no file, so the CLIP BPE vocabulary is",
        ),
        (["--text-tokens", "1"], "--text-tokens 1 leaves no room"),
    ],
)
def test_bad_input_is_one_line(
    shards: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([str(shards), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_vocabulary_may_be_given(shards: Path, clip_vocabulary: Path) -> None:
    seen = look(Preview(str(shards), tokenizer="bpe", vocabulary=clip_vocabulary, samples=2))
    words = [piece for sample in seen for piece in sample.pieces]
    assert words.count("square") + words.count("number") == 2
