"""Draws what the encoder will see: `python -m pipeline.preview DIR --tokens 49 --image-reduction random`.

One row a sample: the stored picture with its crop, the crop, the kept patches at their places with the rest grey, and
the caption above the text tokens that are left of it. Samples, crops and patches are those of a run's first batch.
"""

import io
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import tyro
from PIL import Image

from .batch import Batch
from .captions import TextReduction, TokenizerName
from .colour import ColourJitter
from .command import exit_code
from .decode import crop_box
from .index import open_index
from .loader import DecoderName, Loader, Settings
from .order import Order
from .plan import CropRange, Windows, crop_windows
from .tokens import Geometry, ImageReduction, token_geometry

MAX_SAMPLES = 32
_MASKED = (175, 215)
"""The two greys of the chequers that stand for what the encoder does not see."""
_CHEQUER = 4
"""Their side, in pixels."""
_CROP_SIDE = 224


@dataclass(frozen=True)
class Preview:
    """Draw what the encoder will see of some samples."""

    data: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A shard set."""
    tokens: int = 16
    image_reduction: ImageReduction = "resize"
    image_size: int | None = None
    grid_jitter: bool = False
    patch: int = 16
    text_tokens: int = 16
    text_reduction: TextReduction = "truncate"
    tokenizer: TokenizerName = "wordpiece"
    vocabulary: Path | None = None
    """The tokenizer's vocabulary file; by default that of an installed package."""
    crop_area: tuple[float, float] = (0.4, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    colour_jitter: float = 0.0
    greyscale: float = 0.0
    decoder: DecoderName = "turbo"
    samples: int = 6
    seed: int = 0
    out: Path = Path("preview.png")


@dataclass(frozen=True)
class Seen:
    """One sample on its way to the encoder."""

    picture: npt.NDArray[np.uint8]
    """uint8 [height, width, 3], as stored."""
    window: npt.NDArray[np.float64]
    """float64 [4]: left, top, width, height of the crop."""
    crop: npt.NDArray[np.uint8]
    """uint8 [side, side, 3]: the crop, squeezed to the square."""
    kept: npt.NDArray[np.uint8]
    """uint8 [image_size, image_size, 3]: kept patches at their places, the rest grey chequers."""
    caption: str
    pieces: tuple[str, ...]
    """The text tokens that are left, special ones among them, padding not."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    config = tyro.cli(Preview, args=arguments, description=__doc__)
    seen = look(config)
    draw(seen, config)
    print(f"{config.out}: {len(seen)} samples at {config.tokens} image and {config.text_tokens} text tokens")


def look(config: Preview) -> list[Seen]:
    """Returns the usable samples of the first batch. Raises ValueError for values or data that cannot be."""
    if not 1 <= config.samples <= MAX_SAMPLES:
        raise ValueError(f"--samples {config.samples} is outside 1 to {MAX_SAMPLES}, what fits on a sheet")
    if config.patch < 1:
        raise ValueError(f"--patch {config.patch} is below 1; give the side of a patch in pixels, 16 is usual")
    if not 0 <= config.seed < 2**63:
        raise ValueError(f"--seed {config.seed} is outside 0 to 2**63 - 1; give one that is inside")
    geometry = token_geometry(
        config.tokens,
        image_reduction=config.image_reduction,
        image_size=config.image_size,
        patch=config.patch,
        grid_jitter=config.grid_jitter,
    )
    settings = Settings(
        geometry=geometry,
        text_tokens=config.text_tokens,
        decoder=config.decoder,
        crop=CropRange(config.crop_area, config.crop_ratio),
        colour=ColourJitter(config.colour_jitter, greyscale=config.greyscale),
        text_reduction=config.text_reduction,
        tokenizer=config.tokenizer,
        vocabulary=config.vocabulary,
        seed=config.seed,
    )
    index = open_index([config.data])
    order = Order(index.shard_sizes, batch_size=min(config.samples, index.num_usable), seed=config.seed, lanes=1)
    loader = Loader(index, order, settings)
    batch = loader.batch(0)
    rows = loader.reader.locate_ids(batch.sample_ids.numpy())
    epoch = np.zeros_like(rows.sample_ids)
    windows = crop_windows(config.seed, epoch, rows.sample_ids, rows.width, rows.height, settings.crop)
    jpegs = loader.reader.images(rows)
    captions = loader.reader.captions(rows, loader.caption_choice(rows, epoch))
    seen = [
        _seen(jpegs[slot], captions[slot], windows, batch, slot, geometry, loader)
        for slot in np.flatnonzero(batch.valid.numpy()).tolist()
    ]
    if not seen:
        raise ValueError(f"{config.data}: none of the first {len(jpegs)} samples can be decoded; try another --seed")
    return seen


def _seen(
    jpeg: bytes | str,
    caption: bytes | str,
    windows: Windows,
    batch: Batch,
    slot: int,
    geometry: Geometry,
    loader: Loader,
) -> Seen:
    assert isinstance(jpeg, bytes)
    assert isinstance(caption, bytes)
    with Image.open(io.BytesIO(jpeg)) as image:
        picture = image.convert("RGB")
    box = crop_box(windows[slot], picture)
    crop = picture.resize((_CROP_SIDE, _CROP_SIDE), Image.Resampling.BILINEAR, box=box)
    return Seen(
        picture=np.asarray(picture),
        window=windows[slot],
        crop=np.asarray(crop),
        kept=placed(batch.patches[slot].numpy(), batch.positions[slot].numpy(), geometry),
        caption=caption.decode("utf-8", "replace"),
        pieces=tuple(loader.encoder.spelled(batch.caption_ids[slot].numpy())),
    )


def placed(
    patches: npt.NDArray[np.uint8], positions: npt.NDArray[np.int16], geometry: Geometry
) -> npt.NDArray[np.uint8]:
    """Returns the patches of one image at their places, uint8 [image_size, image_size, 3]; the rest is grey chequers.

    patches: uint8 [tokens, patch*patch*3]; positions: int16 [tokens].
    """
    rows, columns = geometry.grid
    cells = np.tile(masked_patch(geometry.patch), (rows * columns, 1, 1, 1))
    cells[positions] = patches.reshape(-1, geometry.patch, geometry.patch, 3)
    grid = cells.reshape(rows, columns, geometry.patch, geometry.patch, 3).transpose(0, 2, 1, 3, 4)
    return grid.reshape(geometry.image_size, geometry.image_size, 3)


def masked_patch(patch: int) -> npt.NDArray[np.uint8]:
    """Returns what stands for a patch that the encoder does not see, uint8 [patch, patch, 3]."""
    across = np.arange(patch) // _CHEQUER
    light = (across[:, None] + across) % 2
    return np.repeat(np.array(_MASKED, np.uint8)[light][..., None], 3, axis=2)


def draw(seen: list[Seen], config: Preview) -> None:
    """Writes the sheet as a PNG."""
    # Not pyplot, which keeps figures alive and asks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(11, 2.6 * len(seen) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{config.tokens} image tokens by {config.image_reduction}, "
        f"{config.text_tokens} text tokens by {config.text_reduction}"
    )
    axes: Any = figure.subplots(len(seen), 4, squeeze=False, width_ratios=[1, 1, 1, 1.5])
    for row, sample in zip(axes, seen, strict=True):
        pictures = (sample.picture, sample.crop, sample.kept)
        titles = ("stored {1} x {0}".format(*sample.picture.shape), "crop", "what the encoder sees")
        for axis, picture, title in zip(row, pictures, titles, strict=False):
            axis.imshow(picture, interpolation="nearest")
            axis.set_title(title, fontsize=8)
            axis.set_axis_off()
        left, top, width, height = sample.window.tolist()
        row[0].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor="red", linewidth=1.5))
        row[3].set_axis_off()
        text = [textwrap.fill(_drawable(sample.caption[:300]), 44), "", textwrap.fill(" | ".join(sample.pieces), 44)]
        row[3].text(0, 0.95, "\n".join(text), fontsize=8, va="top", family="monospace", parse_math=False)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(config.out, dpi=110, format="png")


def _drawable(text: str) -> str:
    """The text with what the drawing's font has no letter for shown as its number."""
    return "".join(letter if letter < "\u0250" else f"<{ord(letter):x}>" for letter in text)


if __name__ == "__main__":
    sys.exit(main())
