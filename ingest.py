"""Makes training data from a recipe, or smaller copies of it; run again, it continues where it was interrupted.

python ingest.py datasets/emoji.toml --out data/emoji
python ingest.py shrink SRC --out DIR --short-side 128
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.ingest import emoji, shrink
from pipeline.ingest.recipe import load


@dataclass(frozen=True)
class Ingest:
    """Make image-text shards from a recipe. The same command continues what was interrupted."""

    recipe: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A recipe file, such as datasets/emoji.toml."""
    out: Path
    """Folder for the shards."""
    workers: int = os.cpu_count() or 1
    """Processes. Their number does not change the data."""


@dataclass(frozen=True)
class Shrink:
    """Make a low-resolution copy of a shard set, for a fraction of the bytes and of the decoding.

    The same command continues what was interrupted.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder that holds NNNNN.tar shards."""
    out: Path
    """Folder for the copies."""
    short_side: int = 128
    """Of the images, in pixels; none is enlarged."""
    quality: int = 90
    """Of the JPEGs, 1 to 100."""
    engine: Literal["local", "ray"] = "local"
    """local: processes of this machine. ray: tasks on the cluster that RAY_ADDRESS names, which has this package and
    the two folders on every machine; without RAY_ADDRESS, on this machine."""
    workers: int | None = None
    """Shards in work at a time; default: one a core, with Ray of the whole cluster. Does not change the data."""


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} is less than 1; give at least 1")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["shrink"]:
        config = tyro.cli(Shrink, args=arguments[1:], prog="ingest.py shrink")
        _report(lambda: make_copies(config))
    else:
        config = tyro.cli(Ingest, args=arguments, description=__doc__)
        _report(lambda: make_shards(config))


def make_shards(config: Ingest) -> str:
    """Makes what the recipe says and returns a line for each shard set."""
    _check_workers(config.workers)
    summary = emoji.make(load(config.recipe), config.out, config.workers)
    return "\n".join(
        f"{config.out / split}: {entry['samples']:,} pairs in {len(entry['files']) // 2} shards"
        for split, entry in summary["splits"].items()
    )


def make_copies(config: Shrink) -> str:
    """Makes the copies and returns what became of the samples, and the bytes saved."""
    _check_workers(config.workers)
    options = shrink.Options(config.short_side, config.quality)
    report = shrink.shrink(config.source, config.out, options, config.engine, config.workers)
    return shrink.describe(report, config.source, config.out)


def _report(work: Callable[[], str]) -> None:
    """Prints what `work` returns; what the user can mend is one line and exit status 2."""
    try:
        print(work())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
