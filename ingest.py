"""Makes training data from a recipe or own pictures, or smaller copies; run again, it continues.

python ingest.py datasets/emoji.toml --out data/emoji
python ingest.py datasets/cc12m.toml --metadata cc12m.tsv --out data/cc12m
python ingest.py folder PICTURES --out data/mine
python ingest.py shards SRC --out data/mine
python ingest.py shrink SRC --out DIR --short-side 128
python ingest.py report DIR
python ingest.py status DIR

It ends with 0 when all is done, 2 when something must be mended first (one line says what; nothing kept is such a
case), and 130 when it was interrupted.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.command import missing_packages_in_one_line, sigterm_as_ctrl_c

if __name__ == "__main__":
    missing_packages_in_one_line()

import tyro

from pipeline.ingest import advice, chart, emoji, own, passes, shrink, statistics, tables, web
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
class OwnData:
    """What making shards from one's own pictures asks for, wherever they are."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder that holds .tar shards."""
    out: Path
    """Folder for the shards."""
    shrink: int | None = None
    """Short side of the pictures in pixels; none is enlarged. None: sizes stay."""
    min_image_size: int = 32
    """Pictures with a shorter side, in pixels, are left out."""
    max_aspect_ratio: int = 10
    """Pictures with one side over so many times the other are left out."""
    license: str = ""
    """Kept with each sample. Empty, of shards: what the sample's json says."""
    samples_per_shard: int = own.SAMPLES_PER_SHARD
    """Rows of a shard, those that are left out included."""
    workers: int = os.cpu_count() or 1
    """Processes. Their number does not change the data."""


@dataclass(frozen=True)
class Folder(OwnData):
    """Make image-text shards from a folder of pictures: each is decoded, checked, turned upright and made JPEG.

    Without --metadata a picture's caption is in the .txt file of its name, else in the .json file (the key caption or
    text); in a folder that has no such file at all, the folder's name is the caption. The same command continues what
    was interrupted.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder of pictures, with folders in it. Nothing outside it is opened."""
    shrink: int | None = 256
    """Short side of the pictures in pixels; none is enlarged. None: sizes stay."""
    metadata: Path | None = None
    """A table (.csv, .tsv, .parquet) of paths and captions. Paths that are not absolute start at the table's folder."""
    path_column: str = "path"
    """Of the table."""
    caption_column: str = "caption"
    """Of the table."""


@dataclass(frozen=True)
class Shards(OwnData):
    """Make shards from existing webdataset shards: each picture is decoded, checked, turned upright and made JPEG.

    Captions, classes and what else a sample has are kept. The same command continues what was interrupted.
    """


@dataclass(frozen=True)
class ShowReport:
    """Print tables of what became of the rows of a folder, and draw them as DIR/report.png."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """What --out named."""


@dataclass(frozen=True)
class ShowStatus:
    """Print what of a folder is done, what is left and can be retried, and about what that would cost."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """What --out named."""


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
    verb = arguments[0] if arguments else ""
    if verb not in VERBS:
        # A line for each command: one break alone would be taken for a space.
        recipe = tyro.cli(Ingest, args=arguments, description=(__doc__ or "").replace("\npython", "\n\npython"))
        _report(lambda: make_shards(recipe))
        return
    kind, work = VERBS[verb]
    config = tyro.cli(kind, args=arguments[1:], prog=f"ingest.py {verb}")
    _report(lambda: work(config))


def make_shards(config: Ingest) -> str:
    """Makes what the recipe says and returns a few lines about it."""
    _check_workers(config.workers)
    if config.recipe.is_dir():
        raise ValueError(f"{config.recipe} is a folder, no recipe; of pictures: {own.advice(config.recipe)}")
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
    return _finished(web.make(recipe, config.out, options), config.out)


def make_own(config: Folder | Shards) -> str:
    """Makes shards of own data and returns a few lines about them."""
    _check_workers(config.workers)
    said = {field.name: getattr(config, field.name) for field in fields(config)}
    for name in ("source", "out", "workers"):
        del said[name]
    if isinstance(config, Folder):
        said["table"] = said.pop("metadata")
    options = own.Options("folder" if isinstance(config, Folder) else "shards", **said)
    bare = config.source if isinstance(config, Folder) and config.metadata is None else None
    return _finished(own.make(config.source, config.out, options, config.workers), config.out, own=True, bare=bare)


def _finished(summary: passes.Summary, out: Path, *, own: bool = False, bare: Path | None = None) -> str:
    """Draws the report of a run and returns what to say at its end; own, bare: see advice.nothing_kept.

    Raises ValueError where nothing was kept: whoever goes on to train on it must not think that all is well.
    """
    lines = [passes.describe(summary, out)]
    if summary.rows:
        chart.draw(statistics.statistics(out), out.resolve().name, out / "report.png")
        lines.append(f"picture: {out / 'report.png'}; tables: python ingest.py report {out}")
    if not summary.kept:
        print("\n".join(lines))
        raise ValueError(advice.nothing_kept(summary, out, own, bare))
    return "\n".join(lines)


def show_report(config: ShowReport) -> str:
    """Draws the report of a folder and returns its tables."""
    found = statistics.statistics(config.folder)
    chart.draw(found, config.folder.resolve().name, config.folder / "report.png")
    return f"{tables.report_text(found, config.folder)}\n\npicture: {config.folder / 'report.png'}"


def show_status(config: ShowStatus) -> str:
    """Returns what of a folder is done, left and can be retried."""
    return tables.status_text(config.folder)


def make_copies(config: Shrink) -> str:
    """Makes the copies and returns what became of the samples, and the bytes saved."""
    _check_workers(config.workers)
    own.shards_in(config.source)
    options = shrink.Options(config.short_side, config.quality)
    report = shrink.shrink(config.source, config.out, options, config.engine, config.workers)
    return shrink.describe(report, config.source, config.out)


VERBS: dict[str, tuple[type[Any], Callable[[Any], str]]] = {
    "folder": (Folder, make_own),
    "shards": (Shards, make_own),
    "shrink": (Shrink, make_copies),
    "report": (ShowReport, show_report),
    "status": (ShowStatus, show_status),
}
"""First word of a command -> its flags, and what it does. Anything else is a recipe."""


def _report(work: Callable[[], str]) -> None:
    """Prints what `work` returns; what the user can mend is one line and exit status 2."""
    try:
        with sigterm_as_ctrl_c():
            print(work())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
