"""One image in, its low-resolution JPEG out: upright, never enlarged.

An image that is small and upright already keeps its bytes, metadata among them; what is made anew has none.

A JPEG is decoded by libjpeg-turbo at n/8 of its size, no less than twice the target, then Pillow's bicubic filter makes
the target from that: for 128 pixels 53 dB from a full decode and the same filter, at about 45 % of its cost. Pillow
counts in integers, so every machine makes the same bytes. Of a photograph of 600 x 800, about 2.5 ms for 128 pixels and
6 ms for 256; its Lanczos filter would take 0.6 and 2 ms more.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import simplejpeg
from PIL import Image

from ..scaled import scaled_side
from ..scan import MAX_IMAGE_BYTES, MAX_PIXELS

MIN_DECODED = 2
"""A scaled decode is at least so many times the target, so that its cruder filter takes nothing the target would keep.
At 1, the copy is 45 dB from a full decode's, not 53."""
MAX_JPEG_SIDE = 65_500
"""libjpeg's limit."""
_REDUCING_GAP = 3.0
"""Of over six times the target, whole pixels are averaged first; Pillow's manual calls the result indistinguishable."""
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")
"""What libjpeg-turbo turns into RGB; CMYK goes through Pillow."""
Image.init()
# Those that only read pixels: Pillow would hand PostScript to Ghostscript. Its builds differ in AVIF.
FORMATS = tuple(name for name in ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF") if name in Image.OPEN)

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what makes the image upright."""

TOO_MANY_BYTES = f"image file over {MAX_IMAGE_BYTES >> 20} MiB"
_TOO_MANY_PIXELS = f"over {MAX_PIXELS // 1_000_000} megapixels"


Change = Literal["kept", "shrunk", "turned", "retouched", "converted"]
"""kept: the same bytes. turned: made upright only. retouched: as the caller asked only. converted: was no JPEG that
both decoders of training read."""

Retouch = Callable[[Image.Image], Image.Image]


class Unusable(Exception):
    """No copy can be made of this image; the message is the reason, one of a few so that they can be counted."""


@dataclass(frozen=True)
class Copy:
    """What became of an image."""

    width: int
    height: int
    original_width: int
    """As stored, before it is made upright (of a TIFF, which Pillow turns by itself, after)."""
    original_height: int
    change: Change


def copy_picture(image: bytes, short_side: int, quality: int, retouch: Retouch | None = None) -> tuple[bytes, Copy]:
    """Returns a JPEG of an image, its short side at most `short_side` pixels, and what it is. Raises Unusable.

    retouch: RGB picture, at its final size and as it is stored (not yet upright) -> the picture to take. With it every
    image is encoded anew.
    """
    if len(image) > MAX_IMAGE_BYTES:
        raise Unusable(TOO_MANY_BYTES)
    if image[:3] != b"\xff\xd8\xff":
        return _convert(image, short_side, quality, retouch)
    try:
        header: tuple[Any, ...] = simplejpeg.decode_jpeg_header(image, strict=False)
    except Exception:  # simplejpeg raises ValueError, and KeyError for what libjpeg does not know
        raise Unusable("damaged JPEG header") from None
    height, width = int(header[0]), int(header[1])
    if width * height > MAX_PIXELS:
        raise Unusable(_TOO_MANY_PIXELS)
    if header[2] not in _JPEG_COLOURS:
        return _convert(image, short_side, quality, retouch)
    eighths = _scale_eighths(min(width, height), MIN_DECODED * short_side)
    # 0: full size, which of a picture under 8 pixels 7/8 would seem to be too.
    scaled = (0, 0) if eighths == 8 else (scaled_side(height, eighths), scaled_side(width, eighths))
    try:
        # Strict: a copy of half an image would look whole, and nobody could tell it from a good one any more.
        pixels = simplejpeg.decode_jpeg(image, "RGB", False, False, *scaled, 1.0, None, True)
    except Exception:
        raise Unusable("damaged JPEG data") from None
    turn = _jpeg_turn(image)
    shrinks = min(width, height) > short_side
    if not shrinks and turn is None and retouch is None:
        return image, Copy(width, height, width, height, "kept")
    # The scaled image stands for exactly n/8 of the size, which its rounded one may exceed by 7/8 of a pixel.
    box = (0.0, 0.0, width * eighths / 8, height * eighths / 8)
    picture = _resize(Image.fromarray(pixels), _target(width, height, short_side), box)
    if retouch is not None:
        picture = retouch(picture)
    change = "shrunk" if shrinks else "turned" if turn is not None else "retouched"
    return _encode(picture, turn, (width, height), quality, change)


def _convert(image: bytes, short_side: int, quality: int, retouch: Retouch | None) -> tuple[bytes, Copy]:
    """The same for what Pillow reads and libjpeg-turbo does not; of an animation, the first frame."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                width, height = opened.size
                # From the header, before a pixel is decoded.
                if width * height > MAX_PIXELS:
                    raise Unusable(_TOO_MANY_PIXELS)
                size = _target(width, height, short_side)
                if max(size) > MAX_JPEG_SIDE:
                    raise Unusable(f"over {MAX_JPEG_SIDE:,} pixels long")
                opened.load()
                turn = _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
                picture = _on_white(_resize(_eight_bits(opened), size))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Unusable(_TOO_MANY_PIXELS) from None
    except (Unusable, MemoryError):
        raise
    except Image.UnidentifiedImageError:
        raise Unusable("not an image" if image else "empty image") from None
    except Exception:  # Pillow's readers raise whatever the damage makes them stumble over
        raise Unusable("damaged image data") from None
    if retouch is not None:
        picture = retouch(picture)
    return _encode(picture, turn, (width, height), quality, "converted")


def _target(width: int, height: int, short_side: int) -> tuple[int, int]:
    """The (width, height) of the copy: the short side exact, the long one rounded; never more than the image has."""
    short = min(width, height)
    if short <= short_side:
        return width, height
    return round(width * short_side / short), round(height * short_side / short)


def _scale_eighths(short: int, needed: int) -> int:
    """The n of the n/8 of `short` to decode: the smallest that gives `needed` pixels, but all rather than 5/8 to 7/8.

    libjpeg-turbo has no vector code for those: they cost more than the whole, and lose a little.
    """
    eighths = max(1, -(-8 * needed // short))
    return eighths if eighths <= 4 else 8


def _resize(
    picture: Image.Image, size: tuple[int, int], box: tuple[float, float, float, float] | None = None
) -> Image.Image:
    if picture.size == size:
        return picture
    # Pillow weighs colours by their opacity here, so that hidden ones do not shine through.
    return picture.resize(size, Image.Resampling.BICUBIC, box=box, reducing_gap=_REDUCING_GAP)


def _eight_bits(picture: Image.Image) -> Image.Image:
    """The picture in RGB, or in RGBA where it has transparency."""
    if picture.mode.startswith("I;16"):  # Pillow's own conversion would clip it to white
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
    if picture.mode in ("I", "F"):
        raise Unusable("pixels of 32 bits")
    return picture.convert("RGBA" if picture.has_transparency_data else "RGB")


def _on_white(picture: Image.Image) -> Image.Image:
    if picture.mode != "RGBA":
        return picture
    white = Image.new("RGBA", picture.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, picture).convert("RGB")


def _jpeg_turn(jpeg: bytes) -> Image.Transpose | None:
    """What makes a JPEG upright. Pillow reads the tag, at 0.2 ms, where there is any EXIF."""
    if b"Exif\0\0" not in jpeg:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as opened:
                return _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
    except Exception:  # damaged metadata: the image itself was decoded, and stands as it is stored
        return None


def _encode(
    picture: Image.Image,
    turn: Image.Transpose | None,
    original: tuple[int, int],
    quality: int,
    change: Change,
) -> tuple[bytes, Copy]:
    upright = picture if turn is None else picture.transpose(turn)
    pixels = np.ascontiguousarray(upright)
    jpeg = simplejpeg.encode_jpeg(pixels, quality, colorspace="RGB", colorsubsampling="420", fastdct=False)
    return jpeg, Copy(upright.width, upright.height, *original, change)
