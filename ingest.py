"""Makes training data from a recipe, or smaller copies of it; run again, it continues where it was interrupted.

python ingest.py datasets/emoji.toml --out data/emoji
python ingest.py datasets/cc12m.toml --metadata cc12m.tsv --out data/cc12m
python ingest.py shrink SRC --out DIR --short-side 128
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pipeline.ingest import emoji, passes, shrink, web
from pipeline.ingest.environment import Distributor
from pipeline.ingest.img2dataset import Settings
from pipeline.ingest.recipe import load
from pipeline.ingest.web_recipe import WebRecipe
from pipeline.scan import MIN_SIDE


@dataclass(frozen=True)
class Ingest:
    """Make image-text shards from a recipe. The same command continues what was interrupted."""

    recipe: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
    """A recipe file, such as datasets/emoji.toml."""
    out: Path
    """Folder for the shards."""
    workers: int = os.cpu_count() or 1
    """Processes. Their number does not change the data."""
    metadata: tuple[Path, ...] = ()
    """Web recipes: files of URLs and captions (.parquet, .tsv, .csv), or folders of them."""
    retry: bool = False
    """Web recipes: when all rows were asked for, ask once more for those that may go well now (time-outs, 5xx, 429)."""
    shrink: int | None = None
    """Web recipes: short side of the pictures in pixels, instead of the recipe's size."""
    distributor: Distributor = "multiprocessing"
    """Web recipes: what img2dataset spreads its work with."""
    threads: int = 64
    """Web recipes: requests at once, in each process."""
    per_host: int = 16
    """Web recipes: requests to one host at once."""
    timeout: int = 10
    """Web recipes: seconds without a byte after which a request is given up."""
    deadline: int = 60
    """Web recipes: seconds for a whole picture."""
    max_bytes: int = 20_000_000
    """Web recipes: of a picture's file."""
    allow_loopback: bool = False
    """Web recipes: also ask servers on this machine, which is refused otherwise."""


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


def _check_web(config: Ingest) -> None:
    for name in ("threads", "per_host", "timeout", "deadline", "max_bytes"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} is less than 1; give at least 1")
    if config.shrink is not None and config.shrink < MIN_SIDE:
        raise ValueError(f"--shrink {config.shrink} is under {MIN_SIDE}, the least that can be trained on")


def _refuse_web_flags(config: Ingest) -> None:
    """Raises ValueError for a flag that this recipe could not follow."""
    for field in fields(config):
        if field.name not in ("recipe", "out", "workers") and getattr(config, field.name) != field.default:
            raise ValueError(f"--{field.name.replace('_', '-')} is for recipes of web data; {config.recipe} is none")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["shrink"]:
        config = tyro.cli(Shrink, args=arguments[1:], prog="ingest.py shrink")
        _report(lambda: make_copies(config))
    else:
        config = tyro.cli(Ingest, args=arguments, description=__doc__)
        _report(lambda: make_shards(config))


def make_shards(config: Ingest) -> str:
    """Makes what the recipe says and returns a few lines about it."""
    _check_workers(config.workers)
    recipe = load(config.recipe)
    if isinstance(recipe, WebRecipe):
        return _download(recipe, config)
    _refuse_web_flags(config)
    summary = emoji.make(recipe, config.out, config.workers)
    return "\n".join(
        f"{config.out / split}: {entry['samples']:,} pairs in {len(entry['files']) // 2} shards"
        for split, entry in summary["splits"].items()
    )


def _download(recipe: WebRecipe, config: Ingest) -> str:
    _check_web(config)
    settings = Settings(
        config.distributor,
        config.workers,
        config.threads,
        config.timeout,
        config.deadline,
        config.max_bytes,
        config.per_host,
        config.allow_loopback,
    )
    options = web.Options(config.metadata, config.shrink, config.retry, config.workers, settings)
    return passes.describe(web.make(recipe, config.out, options), config.out)


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
