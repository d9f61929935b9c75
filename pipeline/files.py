"""Files that are whole or not there, and folders with one writer at a time."""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"
"""In a folder that has one writer at a time."""


@contextmanager
def replacing(path: Path) -> Generator[BinaryIO]:
    """Opens a file that takes the name `path` only when it is whole and on disk."""
    # The process id keeps a dying worker of a killed run from writing into this run's file.
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, or nothing."""
    with replacing(path) as file:
        file.write(text.encode())


@contextmanager
def only_writer(folder: Path) -> Generator[None]:
    """Holds `folder` for this process; the kernel lets go when it ends, however it ends.

    Raises ValueError when another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is writing to {folder}; wait for it or choose another --out") from None
        yield
