"""Makes training data from a recipe: `python ingest.py datasets/emoji.toml --out data/emoji`.

Run again, it continues where it was interrupted; a finished folder is left alone.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from pipeline.ingest import emoji
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

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"--workers {self.workers} is less than 1; give at least 1")


def main(arguments: list[str] | None = None) -> None:
    config = tyro.cli(Ingest, args=arguments, description=__doc__)
    try:
        summary = emoji.make(load(config.recipe), config.out, config.workers)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same command to continue", file=sys.stderr)
        sys.exit(130)
    for split, entry in summary["splits"].items():
        print(f"{config.out / split}: {entry['samples']:,} pairs in {len(entry['files']) // 2} shards")


if __name__ == "__main__":
    main()
