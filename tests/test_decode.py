"""Both decoders against the plain reference, on photographs; and what they do with images that cannot be decoded."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import simplejpeg

from pipeline.decode import UNDECODABLE, Decoder, psnr, reference
from pipeline.decode_dali import DaliDecoder
from pipeline.decode_turbo import TurboDecoder, scale_eighths
from pipeline.plan import CropRange, Windows, crop_windows, decoded_windows, kept_positions, whole_windows
from pipeline.tokens import Geometry, ImageReduction, Positions, token_geometry

LEAST_MEAN_PSNR = {"dali": 40.0, "turbo": 36.0}
BLOCK_LEVELS = {"dali": 8, "turbo": 8}


def new_decoder(name: str, geometry: Geometry, batch_size: int) -> Decoder:
    return DaliDecoder(geometry, batch_size) if name == "dali" else TurboDecoder(geometry)


def sides(jpegs: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    found = np.array([simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in jpegs], np.int32)
    return found[:, 1], found[:, 0]


def crops(jpegs: Sequence[bytes]) -> Windows:
    widths, heights = sides(jpegs)
    ids = np.arange(len(jpegs))
    return crop_windows(0, np.zeros_like(ids), ids, widths, heights, CropRange())


def every(jpegs: Sequence[object], tokens: int = 16) -> Positions:
    return np.broadcast_to(np.arange(tokens, dtype=np.int16), (len(jpegs), tokens))


@pytest.mark.parametrize("name", ["dali", "turbo"])
@pytest.mark.parametrize("tokens", [16, 49])
@pytest.mark.parametrize("whole", [False, True])
def test_close_to_the_reference(photo_jpegs: list[bytes], name: str, tokens: int, whole: bool) -> None:
    geometry = token_geometry(tokens)
    widths, heights = sides(photo_jpegs)
    windows = whole_windows(widths, heights) if whole else crops(photo_jpegs)
    decoded = new_decoder(name, geometry, len(photo_jpegs)).decode(
        photo_jpegs, windows, every(photo_jpegs, tokens), widths, heights
    )
    assert decoded.faults == {}
    assert decoded.patches.shape == (len(photo_jpegs), tokens, geometry.patch_values)
    assert decoded.patches.is_contiguous()
    expected = [
        reference(jpeg, window, np.arange(tokens), geometry) for jpeg, window in zip(photo_jpegs, windows, strict=True)
    ]
    found = [psnr(one, other) for one, other in zip(decoded.patches.numpy(), expected, strict=True)]
    assert np.mean(found) >= LEAST_MEAN_PSNR[name], f"mean {np.mean(found):.1f} dB, least {min(found):.1f} dB"
    assert min(found) >= LEAST_MEAN_PSNR[name] - 8, f"mean {np.mean(found):.1f} dB, least {min(found):.1f} dB"


MASKS: list[tuple[ImageReduction, bool]] = [("random", False), ("grid", False), ("grid", True), ("block", False)]


def masked(
    name: str, jpegs: Sequence[bytes], geometry: Geometry, decode_window: bool = True
) -> tuple[np.ndarray, Windows, Positions]:
    """The (patches, whole crops, positions) of a batch by a masking geometry."""
    widths, heights = sides(jpegs)
    ids = np.arange(len(jpegs))
    windows, positions = crops(jpegs), kept_positions(0, ids * 0, ids, geometry)
    if name == "dali":
        decoder: Decoder = DaliDecoder(geometry, len(jpegs), decode_window=decode_window)
    else:
        decoder = TurboDecoder(geometry)
    part = decoded_windows(windows, positions, geometry)
    decoded = decoder.decode(jpegs, part, positions, widths, heights)
    assert decoded.faults == {}
    assert decoded.patches.shape == (len(jpegs), geometry.tokens, geometry.patch_values)
    assert decoded.patches.is_contiguous()
    return decoded.patches.numpy(), windows, positions


@pytest.mark.parametrize("name", ["dali", "turbo"])
@pytest.mark.parametrize(("reduction", "jitter"), MASKS)
def test_masked_patches_are_close_to_the_reference(
    photo_jpegs: list[bytes], name: str, reduction: ImageReduction, jitter: bool
) -> None:
    jpegs = photo_jpegs[:20]
    geometry = token_geometry(49, image_reduction=reduction, grid_jitter=jitter)
    patches, windows, positions = masked(name, jpegs, geometry)
    expected = [reference(*each, geometry) for each in zip(jpegs, windows, positions, strict=True)]
    found = [psnr(one, other) for one, other in zip(patches, expected, strict=True)]
    assert np.mean(found) >= LEAST_MEAN_PSNR[name], f"mean {np.mean(found):.1f} dB, least {min(found):.1f} dB"


@pytest.mark.parametrize("name", ["dali", "turbo"])
@pytest.mark.parametrize(("reduction", "jitter"), MASKS)
def test_kept_patches_are_those_of_the_same_decoders_whole_image(
    photo_jpegs: list[bytes], name: str, reduction: ImageReduction, jitter: bool
) -> None:
    jpegs = photo_jpegs[:20]
    geometry = token_geometry(49, image_reduction=reduction, grid_jitter=jitter)
    patches, windows, positions = masked(name, jpegs, geometry)
    widths, heights = sides(jpegs)
    whole_decoder = new_decoder(name, geometry.unmasked(), len(jpegs))
    whole = whole_decoder.decode(jpegs, windows, every(jpegs, 196), widths, heights).patches.numpy()
    expected = np.take_along_axis(whole, positions[..., None].astype(np.int64), axis=1)
    if reduction != "block":
        assert (patches == expected).all()
    else:  # decoded on its own: the same to a level or so, by the rounding of other window sizes
        off = np.abs(patches.astype(int) - expected)
        assert psnr(patches, expected) > 55, f"{psnr(patches, expected):.1f} dB, up to {off.max()} levels"
        assert off.max() <= BLOCK_LEVELS[name], f"off by {off.max()} levels"


@pytest.mark.parametrize("reduction", ["resize", "random", "block"])
def test_decoding_whole_images_gives_the_same_as_windows(photo_jpegs: list[bytes], reduction: ImageReduction) -> None:
    """The way round a GPU decoder that cannot do windows."""
    jpegs = photo_jpegs[:20]
    geometry = token_geometry(49, image_reduction=reduction)
    window, whole = (masked("dali", jpegs, geometry, decode_window)[0] for decode_window in (True, False))
    assert psnr(window, whole) > 55, f"{psnr(window, whole):.1f} dB"


@pytest.mark.parametrize("name", ["dali", "turbo"])
def test_a_slot_does_not_depend_on_its_batch(photo_jpegs: list[bytes], name: str) -> None:
    geometry = token_geometry(16)
    widths, heights = sides(photo_jpegs)
    windows = crops(photo_jpegs)
    decoder = new_decoder(name, geometry, len(photo_jpegs))
    whole = decoder.decode(photo_jpegs, windows, every(photo_jpegs), widths, heights).patches
    part = slice(5, 12)
    again = decoder.decode(
        photo_jpegs[part], windows[part], every(photo_jpegs[part]), widths[part], heights[part]
    ).patches
    assert (whole[part] == again).all()


def without_scan(jpeg: bytes) -> bytes:
    return jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9"


def with_empty_scan(jpeg: bytes) -> bytes:
    return jpeg[: jpeg.index(b"\xff\xda") + 14]


# libjpeg fills a scan that ends too soon with grey; DALI gives up, and loses its pipeline.
BAD = {
    "dali": {"no scan": without_scan, "empty scan": with_empty_scan, "noise": lambda _: b"\xff\xd8\xff" + bytes(999)},
    "turbo": {"no scan": without_scan, "noise": lambda _: b"\xff\xd8\xff" + bytes(999)},
}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in BAD.items() for kind in kinds])
def test_bad_images_are_named_and_the_others_unharmed(photo_jpegs: list[bytes], name: str, kind: str) -> None:
    geometry = token_geometry(16)
    widths, heights = sides(photo_jpegs)
    windows = crops(photo_jpegs)
    decoder = new_decoder(name, geometry, len(photo_jpegs))
    expected = decoder.decode(photo_jpegs, windows, every(photo_jpegs), widths, heights).patches
    jpegs: list[bytes | None] = list(photo_jpegs)
    jpegs[3] = None
    for slot in (7, 8, 30):
        jpegs[slot] = BAD[name][kind](photo_jpegs[slot])
    for _ in range(2):
        decoded = decoder.decode(jpegs, windows, every(jpegs), widths, heights)
        assert decoded.faults == dict.fromkeys((7, 8, 30), UNDECODABLE)
        kept = np.setdiff1d(np.arange(len(jpegs)), [3, 7, 8, 30])
        assert (decoded.patches[kept] == expected[kept]).all()


@pytest.mark.parametrize("name", ["dali", "turbo"])
@pytest.mark.parametrize("tokens", [16, 196])
def test_an_image_of_another_size_than_indexed_is_refused(photo_jpegs: list[bytes], name: str, tokens: int) -> None:
    jpegs = photo_jpegs[:3]
    widths, heights = sides(jpegs)
    windows = crops(jpegs)
    decoder = new_decoder(name, token_geometry(tokens), 3)
    swapped = [jpegs[0], jpegs[2], jpegs[2]]
    decoded = decoder.decode(swapped, windows, every(jpegs, tokens), widths, heights)
    assert decoded.faults == {1: "image is not of the size that was indexed"}


class FailingPipeline:
    """A DALI pipeline that gives up a number of times, whatever it is fed, as one does that runs out of memory."""

    def __init__(self, decoder: DaliDecoder, failures: int) -> None:
        self._decoder, self._failures = decoder, failures
        self._run, decoder._run = decoder._run, self.run

    def run(self, *fed: Any) -> Any:
        self._failures -= 1
        if self._failures >= 0:
            raise RuntimeError("Critical error in pipeline:\nout of memory\n")
        return self._run(*fed)


def test_dali_running_out_of_memory_blames_no_image(photo_jpegs: list[bytes]) -> None:
    jpegs = photo_jpegs[:4]
    widths, heights = sides(jpegs)
    windows = crops(jpegs)
    expected = DaliDecoder(token_geometry(16), 4).decode(jpegs, windows, every(jpegs), widths, heights).patches
    decoder = DaliDecoder(token_geometry(16), 4)
    FailingPipeline(decoder, failures=3)  # the batch, its first half, and that one's first image
    decoded = decoder.decode(jpegs, windows, every(jpegs), widths, heights)
    assert decoded.faults == {}
    assert (decoded.patches == expected).all()
    FailingPipeline(decoder, failures=10**9)
    with pytest.raises(ValueError, match="DALI fails without any image to blame: out of memory"):
        decoder.decode(jpegs, windows, every(jpegs), widths, heights)


@pytest.mark.parametrize("name", ["dali", "turbo"])
@pytest.mark.parametrize("size", [(160, 160), (240, 160)])
def test_orientation_tags_are_ignored(photographs: list[np.ndarray], name: str, size: tuple[int, int]) -> None:
    import io

    from PIL import Image

    plain, turned = io.BytesIO(), io.BytesIO()
    image = Image.fromarray(photographs[0]).resize(size)
    image.save(plain, "JPEG", quality=90)
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(turned, "JPEG", quality=90, exif=exif)
    jpegs = [plain.getvalue(), turned.getvalue()]
    widths, heights = sides(jpegs)
    decoded = new_decoder(name, token_geometry(16), 2).decode(
        jpegs, whole_windows(widths, heights), every(jpegs), widths, heights
    )
    assert decoded.faults == {}
    assert (decoded.patches[0] == decoded.patches[1]).all()


@pytest.mark.parametrize("name", ["dali", "turbo"])
def test_grey_progressive_and_bit_rot_are_decoded(photo_jpegs: list[bytes], name: str) -> None:
    import io

    from PIL import Image

    grey, progressive = io.BytesIO(), io.BytesIO()
    with Image.open(io.BytesIO(photo_jpegs[0])) as image:
        image.convert("L").save(grey, "JPEG", quality=90)
        image.save(progressive, "JPEG", quality=95, progressive=True)
    rotten = bytearray(photo_jpegs[0])
    rotten[len(rotten) // 2] ^= 0x5A
    jpegs = [grey.getvalue(), progressive.getvalue(), bytes(rotten)]
    widths, heights = sides(jpegs)
    windows = whole_windows(widths, heights)
    decoded = new_decoder(name, token_geometry(16), 3).decode(jpegs, windows, every(jpegs), widths, heights)
    assert decoded.faults == {}
    for slot in (0, 1):
        expected = reference(jpegs[slot], windows[slot], np.arange(16), token_geometry(16))
        assert psnr(decoded.patches[slot].numpy(), expected) > LEAST_MEAN_PSNR[name] - 8


def test_scale_is_the_smallest_that_covers_the_target() -> None:
    sizes = np.array([[64.0, 64.0], [128, 128], [80, 500], [512, 512], [5000, 5000], [63, 90], [96, 200]])
    windows = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
    assert scale_eighths(windows, (64, 64)).tolist() == [8, 4, 8, 1, 1, 8, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dali", "turbo"])
def test_close_to_the_reference_on_the_starter(name: str) -> None:
    """Flat art with hard edges, as the starter draws it: every 50th picture of the real packages."""
    from pathlib import Path

    from pipeline.ingest.art import collect
    from pipeline.ingest.npm import cache_dir, fetch_all
    from pipeline.ingest.recipe import load
    from pipeline.ingest.scenes import paint, plan_portrait

    recipe = load(Path(__file__).parents[1] / "datasets" / "emoji.toml")
    try:
        tarballs = fetch_all([recipe.labels, *recipe.styles], cache_dir())
    except ValueError as error:
        pytest.skip(str(error))
    pictures = collect(recipe.labels, recipe.styles, tarballs)[::50]
    drawn = [paint(plan_portrait(picture, 0, recipe.image_size), recipe.image_size)[0] for picture in pictures]
    jpegs = [simplejpeg.encode_jpeg(pixels, recipe.jpeg_quality, colorsubsampling="420") for pixels in drawn]
    geometry = token_geometry(16)
    widths, heights = sides(jpegs)
    windows = crops(jpegs)
    patches = new_decoder(name, geometry, len(jpegs)).decode(jpegs, windows, every(jpegs), widths, heights).patches
    pairs = zip(patches.numpy(), jpegs, windows, strict=True)
    positions = np.arange(16, dtype=np.int16)
    found = [psnr(one, reference(jpeg, window, positions, geometry)) for one, jpeg, window in pairs]
    assert np.mean(found) >= LEAST_MEAN_PSNR[name], f"mean {np.mean(found):.1f} dB, least {min(found):.1f} dB"
