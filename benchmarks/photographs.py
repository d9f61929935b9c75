"""Makes the shards that the loader benchmark reads, from real photographs: `python -m benchmarks.photographs`.

Three sets, as webdataset shards in img2dataset's layout: raw web size (about 600 x 800), and 256 and 128 px on the
short side. Every sample is a crop of a photograph, reduced by a random factor. Few sources, so good for speed (bits per
pixel are real) and for nothing else. The same photographs and libraries give the same bytes; a finished folder is left
alone.
"""

import functools
import json
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import tyro
from PIL import Image
from tqdm import tqdm

from pipeline.files import only_writer, write_text
from pipeline.ingest.shards import Sample, Shard, split_shards, write_shards

from .photograph_captions import caption
from .photograph_sources import Photograph, fetched_photographs, own_photographs

_LONGEST_SIDE = 1920
"""Photographs are reduced to it when they are read: every one of them stays in memory."""
_SAMPLES_PER_SHARD = 500
_RECORD = "photographs.json"


@dataclass(frozen=True)
class SetSize:
    """How the pictures of one set are sized and encoded."""

    short_side: tuple[int, int]
    """Pixels, drawn evenly from low to high."""
    quality: int
    """JPEG's, 4:2:0."""
    largest_factor: float
    """A crop is up to so many times as wide as what is stored: more of it is more detail, so more bits per pixel."""


SETS = {
    "raw": SetSize((520, 680), 85, 1.6),
    "256": SetSize((256, 256), 95, 3.5),
    "128": SetSize((128, 128), 90, 8.0),
}
_LONGEST_RATIO = 1.5


@dataclass(frozen=True)
class Photographs:
    """Make the benchmark's three shard sets: DIR/raw, DIR/256 and DIR/128."""

    out: Path = Path("data/photographs")
    """Folder for the sets; sources/ in it keeps what was fetched."""
    samples: int = 3000
    """In each set."""
    photographs: Path | None = None
    """A folder of your own photographs (.jpg, .png) instead of Debian's."""
    seed: int = 0
    workers: int = os.cpu_count() or 1
    """Processes, of about 300 MB each. Their number does not change the data."""

    def check(self) -> None:
        """Raises ValueError for what cannot be."""
        for name in ("samples", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} is below 1; give at least 1")


@dataclass(frozen=True)
class Crop:
    """One sample, planned: which part of which photograph becomes how large a JPEG."""

    photograph: Photograph
    box: tuple[float, float, float, float]
    """left, top, right, bottom, in pixels of the photograph as `_pixels` gives it."""
    width: int
    height: int
    quality: int
    caption: str


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for what the user can mend."""
    try:
        config = tyro.cli(Photographs, args=arguments, description=__doc__)
        config.check()
        make(config)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        return 130
    for name in SETS:
        shards = sorted((config.out / name).glob("*.tar"))
        print(f"{config.out / name}: {config.samples:,} samples in {len(shards)} shards")
    return 0


def make(config: Photographs) -> None:
    """Writes the sets, or what is missing of them. Raises ValueError where `out` holds others."""
    record = {"samples": config.samples, "seed": config.seed, "photographs": str(config.photographs or "fetched")}
    path = config.out / _RECORD
    if path.exists() and (before := json.loads(path.read_text())) != record:
        other = ", ".join(f"{name} {before.get(name)}" for name in record if before.get(name) != record[name])
        raise ValueError(f"--out {config.out} holds other photographs ({other}); delete it or give another folder")
    finished = config.out / ".finished"
    if finished.exists():
        return
    with only_writer(config.out):
        write_text(path, json.dumps(record, indent=1) + "\n")
        photographs = (
            own_photographs(config.photographs) if config.photographs else fetched_photographs(config.out / "sources")
        )
        shards: list[Shard[Crop]] = []
        for name in SETS:
            crops = plan(photographs, name, config.samples, config.seed)
            shards += split_shards(config.out / name, crops, draw, _SAMPLES_PER_SHARD)
        with tqdm(total=len(SETS) * config.samples, unit=" samples", desc="cutting", disable=None) as bar:
            bar.update(sum(len(shard.plans) for shard in shards if shard.complete))

            def advance(shard: Shard[Crop]) -> None:
                bar.update(len(shard.plans))

            write_shards(shards, config.workers, advance)
        write_text(finished, "")


def plan(photographs: Sequence[Photograph], name: str, samples: int, seed: int) -> list[Crop]:
    """Returns the samples of set `name`: a pure function of its arguments and the photographs' sizes."""
    size, number = SETS[name], tuple(SETS).index(name)
    sizes = [_size(photograph.path) for photograph in photographs]
    # Whichever way up a crop is, it fits without being enlarged.
    needed = math.ceil(size.short_side[1] * _LONGEST_RATIO)
    large = [i for i, sides in enumerate(sizes) if min(sides) >= needed]
    if not large:
        raise ValueError(
            f"none of {len(photographs)} photographs has {needed} pixels on its short side, which the set {name} needs "
            f"(they are reduced to {_LONGEST_SIDE} on the long side first); give larger ones"
        )
    return [_crop(np.random.default_rng([seed, number, i]), photographs, sizes, large, size) for i in range(samples)]


def _crop(
    rng: np.random.Generator,
    photographs: Sequence[Photograph],
    sizes: Sequence[tuple[int, int]],
    large: Sequence[int],
    size: SetSize,
) -> Crop:
    chosen = large[int(rng.integers(len(large)))]
    short = int(rng.integers(size.short_side[0], size.short_side[1] + 1))
    long = round(short * rng.uniform(1, _LONGEST_RATIO))
    width, height = (long, short) if rng.random() < 0.6 else (short, long)
    room_width, room_height = sizes[chosen]
    most = min(size.largest_factor, room_width / width, room_height / height)
    factor = most ** rng.random()
    left = rng.uniform(0, room_width - factor * width)
    top = rng.uniform(0, room_height - factor * height)
    box = (left, top, min(left + factor * width, room_width), min(top + factor * height, room_height))
    return Crop(photographs[chosen], box, width, height, size.quality, caption(rng, photographs[chosen].subject))


def draw(crop: Crop) -> Sample:
    """Returns a planned sample, cut and encoded."""
    image = _pixels(crop.photograph.path).resize((crop.width, crop.height), Image.Resampling.LANCZOS, box=crop.box)
    jpeg = simplejpeg.encode_jpeg(np.asarray(image), crop.quality, colorsubsampling="420", fastdct=False)
    package = crop.photograph.package
    return Sample(
        jpeg=jpeg,
        width=crop.width,
        height=crop.height,
        caption=crop.caption,
        url=f"{package}/{crop.photograph.path.name}",
        license=f"LicenseRef-{package}",
        style="photograph",
    )


def _size(path: Path) -> tuple[int, int]:
    """(width, height) of a photograph as `_pixels` gives it."""
    with Image.open(path) as image:
        scale = min(1.0, _LONGEST_SIDE / max(image.size))
        return round(image.width * scale), round(image.height * scale)


@functools.cache
def _pixels(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB").resize(_size(path), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main())
