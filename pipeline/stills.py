"""Pictures of any format that Pillow reads, in files or in tars without captions: whole, as the patches of a grid.

For evaluation sets as others lay them out. What is computed is, to the bit, what torchvision's Resize and CenterCrop
make of a Pillow image. Orientation tags are ignored, as in training. About 5 ms a picture of 500 x 400.
"""

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from .ingest.picture import FORMATS, TOO_MANY_BYTES
from .scan import MAX_IMAGE_BYTES, MAX_PIXELS
from .tokens import Geometry, patchify

Resize = Literal["squash", "shorter"]
Interpolation = Literal["bilinear", "bicubic"]

_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
MISSING = "no such file"
"""Why a picture that is not there is unreadable."""
_TOO_MANY_PIXELS = f"over {MAX_PIXELS // 1_000_000} megapixels"


@dataclass(frozen=True)
class Still:
    """Where a picture's bytes are: a file, or [offset, offset + size) of one."""

    path: Path
    offset: int = 0
    size: int | None = None
    """None: up to the end of the file."""
    key: str = ""
    """Its name inside the file, where that holds several."""

    @property
    def name(self) -> str:
        """What a person would look for."""
        return f"{self.path}: {self.key}" if self.key else str(self.path)

    def read(self) -> bytes:
        """Returns the picture's bytes. Raises Unreadable."""
        try:
            with self.path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size if self.size is None else self.size
                if size > MAX_IMAGE_BYTES:
                    raise Unreadable(TOO_MANY_BYTES)
                file.seek(self.offset)
                return file.read(size)
        except FileNotFoundError:
            raise Unreadable(MISSING) from None
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror or error})") from None


class Unreadable(Exception):
    """A picture that cannot be used; the message is the reason, one of a few."""


@dataclass(frozen=True)
class Preprocess:
    """How a whole picture becomes a square."""

    resize: Resize = "squash"
    """`squash`: both sides to the square's, whatever they were. `shorter`: the shorter side to the square's, then the
    middle of the longer."""
    interpolation: Interpolation = "bilinear"

    def square(self, picture: Image.Image, side: int) -> Image.Image:
        """Returns a picture's square of `side` pixels, in the picture's own mode."""
        kernel = _FILTERS[self.interpolation]
        if self.resize == "squash":
            return picture.resize((side, side), kernel)
        width, height = picture.size
        # Source of both roundings: torchvision's Resize (cuts off) and CenterCrop (to even).
        short = min(width, height)
        size = (int(side * width / short), side) if height <= width else (side, int(side * height / short))
        scaled = picture.resize(size, kernel)
        left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
        return scaled.crop((left, top, left + side, top + side))


def decode_still(still: Still, preprocess: Preprocess | None, side: int) -> npt.NDArray[np.uint8]:
    """Returns a picture, uint8 [side, side, 3]; without `preprocess` at its own size. Raises Unreadable.

    Pillow warns of odd files: the caller says what becomes of warnings, which are the process's, not a thread's.
    """
    content = still.read()
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            # From the header, before a pixel is decoded.
            if opened.width * opened.height > MAX_PIXELS:
                raise Unreadable(_TOO_MANY_PIXELS)
            picture = opened.convert("RGB")
        return np.asarray(picture if preprocess is None else preprocess.square(picture, side))
    except (Unreadable, MemoryError):
        raise
    except Image.DecompressionBombError:
        raise Unreadable(_TOO_MANY_PIXELS) from None
    except Image.UnidentifiedImageError:
        raise Unreadable("not an image" if content else "empty image") from None
    except Exception:  # Pillow's readers raise whatever the damage makes them stumble over
        raise Unreadable("damaged image data") from None


@dataclass(frozen=True)
class StillBatch:
    """Pictures as the encoder takes them."""

    patches: torch.Tensor
    """uint8 [batch, rows * columns, patch*patch*3]; zeros where the picture is bad."""
    positions: torch.Tensor
    """int16 [batch, rows * columns]: all of them, in order."""
    faults: dict[int, str]
    """Slot -> reason."""


def still_batches(
    stills: Sequence[Still], geometry: Geometry, preprocess: Preprocess, batch_size: int
) -> Iterator[StillBatch]:
    """Yields the pictures in order, all patches of the geometry's grid. In memory: a batch, and a picture a core."""
    geometry = geometry.unmasked()
    side, tokens = geometry.image_size, geometry.tokens

    def square(still: Still) -> npt.NDArray[np.uint8] | str:
        try:
            return decode_still(still, preprocess, side)
        except Unreadable as unreadable:
            return str(unreadable)

    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="stills") as pool:
        for start in range(0, len(stills), batch_size):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = list(pool.map(square, stills[start : start + batch_size]))
            pixels = np.zeros((len(found), side, side, 3), np.uint8)
            faults: dict[int, str] = {}
            for slot, picture in enumerate(found):
                if isinstance(picture, str):
                    faults[slot] = picture
                else:
                    pixels[slot] = picture
            positions = torch.arange(tokens, dtype=torch.int16).repeat(len(found), 1)
            yield StillBatch(torch.from_numpy(patchify(pixels, geometry.patch)), positions, faults)


def whole_picture(still: Still) -> npt.NDArray[np.uint8]:
    """Returns a picture at its own size, uint8 [height, width, 3], for a person to look at. Raises Unreadable."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return decode_still(still, None, 0)
