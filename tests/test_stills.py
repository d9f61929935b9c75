"""Pictures outside training shards: what Pillow makes of each, and tars in clip_benchmark's layout."""

import io
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import encode, png, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipeline.still_shards import tar_samples
from pipeline.stills import Preprocess, Still, Unreadable, decode_still, still_batches, whole_picture
from pipeline.tokens import patchify, token_geometry

Pixels = npt.NDArray[np.uint8]


def saved(pixels: Pixels, form: str, mode: str = "RGB", **more: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(stream, form, **more)
    return stream.getvalue()


@settings(max_examples=40)
@given(st.integers(8, 90), st.integers(8, 90), st.sampled_from([16, 32, 48]), st.sampled_from(["bilinear", "bicubic"]))
def test_shorter_is_the_middle_of_the_whole_resized(width: int, height: int, side: int, kernel: Any) -> None:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    picture = Image.fromarray(pixels)
    found = np.asarray(Preprocess("shorter", kernel).square(picture, side))
    assert found.shape == (side, side, 3)
    long = int(side * max(width, height) / min(width, height))
    size = (side, long) if width <= height else (long, side)
    whole = np.asarray(picture.resize(size, Image.Resampling[kernel.upper()]))
    first = round((long - side) / 2)
    middle = slice(first, first + side)
    np.testing.assert_array_equal(found, whole[middle] if width <= height else whole[:, middle])
    if width == height:
        np.testing.assert_array_equal(found, np.asarray(Preprocess("squash", kernel).square(picture, side)))


def test_squash_sees_all_and_shorter_does_not() -> None:
    pixels = np.zeros((64, 256, 3), np.uint8)
    pixels[:, :48] = 255
    squashed, shorter = (
        np.asarray(Preprocess(way, "bilinear").square(Image.fromarray(pixels), 32)) for way in ("squash", "shorter")
    )
    assert squashed[:, :5].min() == 255
    assert shorter.max() == 0


FORMATS = [
    ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"), ("PNG", "1"),
    ("WEBP", "RGB"), ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"),
]  # fmt: skip


@pytest.mark.parametrize(("form", "mode"), FORMATS)
def test_every_format_is_what_pillow_makes_rgb_of_it(
    tmp_path: Path, photographs: list[Pixels], form: str, mode: str
) -> None:
    content = saved(photographs[1][:120, :200], form, mode)
    (tmp_path / "picture").write_bytes(b"before" + content)
    still = Still(tmp_path / "picture", 6, len(content), "key")
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    np.testing.assert_array_equal(whole_picture(still), np.asarray(expected))
    resized = np.asarray(expected.resize((32, 32), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(decode_still(still, Preprocess("squash", "bicubic"), 32), resized)


def test_orientation_tags_are_ignored(tmp_path: Path, photographs: list[Pixels]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, more in (("plain", {}), ("turned", {"exif": exif})):
        (tmp_path / name).write_bytes(saved(photographs[0][:90, :150], "JPEG", **more))
    plain, turned = (whole_picture(Still(tmp_path / name)) for name in ("plain", "turned"))
    np.testing.assert_array_equal(plain, turned)


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header says that it is huge."""
    chunks = (b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT" + bytes(8))
    framed = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def test_bad_pictures_cost_their_slot_and_no_more(tmp_path: Path, photographs: list[Pixels]) -> None:
    good = encode(photographs[1][:100, :130])
    files: dict[str, bytes | None] = {
        "a.jpg": good, "cut.jpg": good[: len(good) // 2], "empty.jpg": b"", "text.jpg": b"<html>404</html>",
        "bomb.png": bomb(9_000, 9_000), "bigger.png": bomb(60_000, 60_000), "gone.jpg": None, "z.jpg": good,
        "cut.png": png(photographs[1][:50, :50])[:700],
    }  # fmt: skip
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    stills = [Still(tmp_path / name) for name in files]
    geometry, preprocess = token_geometry(16), Preprocess()
    batches = list(still_batches(stills, geometry, preprocess, 4))
    faults = {4 * i + slot: reason for i, batch in enumerate(batches) for slot, reason in batch.faults.items()}
    reasons = {name: faults[slot] for slot, name in enumerate(files) if slot in faults}
    assert reasons == {
        "cut.jpg": "damaged image data", "empty.jpg": "empty image", "text.jpg": "not an image",
        "bomb.png": "over 64 megapixels", "bigger.png": "over 64 megapixels", "gone.jpg": "no such file",
        "cut.png": "damaged image data",
    }  # fmt: skip
    patches = np.concatenate([batch.patches.numpy() for batch in batches])
    alone = patchify(decode_still(stills[0], preprocess, 64)[None], 16)[0]
    for slot, name in enumerate(files):
        np.testing.assert_array_equal(patches[slot], 0 if name in reasons else alone)
    assert [batch.positions.shape for batch in batches] == [(4, 16), (4, 16), (1, 16)]
    with pytest.raises(Unreadable, match="no such file"):
        whole_picture(stills[6])


def test_warnings_of_pillow_do_not_reach_the_user(tmp_path: Path, photographs: list[Pixels]) -> None:
    image = Image.fromarray(photographs[1][:60, :60]).convert("P")
    image.save(tmp_path / "p.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        [batch] = still_batches([Still(tmp_path / "p.png")], token_geometry(4), Preprocess(), 8)
    assert not batch.faults


def test_masked_geometries_are_seen_whole(tmp_path: Path, photographs: list[Pixels]) -> None:
    (tmp_path / "a.jpg").write_bytes(encode(photographs[0]))
    masked = token_geometry(4, image_reduction="block", image_size=64)
    [batch] = still_batches([Still(tmp_path / "a.jpg")], masked, Preprocess(), 8)
    assert batch.patches.shape == (1, 16, 768)
    np.testing.assert_array_equal(batch.positions.numpy(), [np.arange(16)])


def test_samples_of_a_tar(tmp_path: Path, photographs: list[Pixels]) -> None:
    small = photographs[1][:40, :60]
    samples = [
        {"__key__": "s0", "jpg": encode(small), "cls": b"3\n"},
        {"__key__": "s1", "webp": saved(small, "WEBP", lossless=True), "cls": b"0", "json": b"{}"},
        {"__key__": "s2", "png": png(small), "txt": b"one\n\n two \n"},
        {"__key__": "s3", "cls": b"1"},
    ]
    write_tar(tmp_path / "0.tar", samples[:2])
    write_tar(tmp_path / "1.tar", samples[2:])
    tars = [tmp_path / "0.tar", tmp_path / "1.tar"]
    found, damaged = tar_samples(tars)
    assert damaged == []
    assert [(sample.class_id, sample.captions) for sample in found] == [(3, ()), (0, ()), (-1, (b"one", b"two"))]
    assert [sample.still.key for sample in found] == ["s0.jpg", "s1.webp", "s2.png"]
    for sample in found[1:]:
        np.testing.assert_array_equal(whole_picture(sample.still), small)
    tars[0].write_bytes(tars[0].read_bytes()[: found[1].still.offset + 10])
    (tmp_path / "2.tar").write_bytes(b"")
    found, damaged = tar_samples([*tars, tmp_path / "2.tar"])
    assert [sample.still.key for sample in found] == ["s0.jpg", "s2.png"]
    assert [phrase.partition(": ")[0] for phrase in damaged] == [str(tars[0]), str(tmp_path / "2.tar")]
    write_tar(tars[0], [{"__key__": "s9", "jpg": encode(small), "cls": b"cat"}])
    with pytest.raises(ValueError, match=r"0\.tar: s9\.cls holds 'cat', which is no class number"):
        tar_samples(tars)
    write_tar(tars[0], samples[3:])
    with pytest.raises(ValueError, match="no picture in its 1 tars"):
        tar_samples(tars[:1])
