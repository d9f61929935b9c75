"""What the commands of the benchmarks write alike: figures and pictures, into files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files import replacing

if TYPE_CHECKING:  # most commands draw nothing
    from matplotlib.figure import Figure


def write_json(path: Path | None, result: Mapping[str, Any], indent: int | None = 1) -> None:
    """Writes what --json asked for; nothing where it did not. Makes the folder."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=indent) + "\n")


def write_picture(figure: "Figure", path: Path) -> None:
    """Writes a whole PNG, or nothing. Makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=120)
