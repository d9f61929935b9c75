"""What the two dialects of CLIPA's texts have in common, and where their vocabulary files lie.

A vocabulary is not ours to ship: it comes with an installed distribution, found through its metadata and never
imported, or as a file that the user names. Either way it must be the very file that the models were trained with.
"""

import hashlib
import os
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

# The loader's threads are the parallelism; the library's own would fight with them for the cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PieceIds = npt.NDArray[np.int32]
PieceClasses = npt.NDArray[np.uint8]
"""uint8 [pieces]: 1 noun, 2 adjective, 3 verb, 4 everything else; the lower, the sooner it is kept."""


class Dialect(Protocol):
    """How a family of models writes a caption: text into pieces, a mark before them and perhaps one after."""

    tokenizer: Any
    """A `tokenizers.Tokenizer` without special tokens, so that the text of a caption can never become one."""
    start_id: int
    end_id: int | None

    def read(self, caption: bytes) -> str:
        """Returns the text that the tokenizer is given; bytes that are not UTF-8 become replacement characters."""
        ...

    def spell(self, piece: int) -> str:
        """Returns a piece as text, for a person to read."""
        ...

    def classes(self, ids: PieceIds) -> PieceClasses:
        """Returns the class of each piece. ids: int32 [pieces], of whole captions laid end to end."""
        ...


def vocabulary_file(
    name: str, *, file: str, sha256: str, distributions: Sequence[str], remedy: str, given: Path | None = None
) -> Path:
    """Returns the path of a vocabulary: `given`, or the file of that name in the first distribution that has it.

    Raises ValueError, ending in `remedy`, when it is missing or is not the file with this sha256.
    """
    path = given or next((found for each in distributions if (found := _installed(each, file))), None)
    if path is None:
        raise ValueError(f"the {name} vocabulary is missing: {remedy}")
    if not path.is_file():
        raise ValueError(f"{path} is no file, so the {name} vocabulary is missing: {remedy}")
    if (found := hashlib.sha256(path.read_bytes()).hexdigest()) != sha256:
        raise ValueError(
            f"{path} is not the {name} vocabulary (its sha256 is {found[:12]}..., not {sha256[:12]}...): {remedy}"
        )
    return path


def _installed(distribution: str, name: str) -> Path | None:
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name == name)
    return next((path for path in paths if path.is_file()), None)
