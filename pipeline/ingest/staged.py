"""Tars that are still being written in, how much they hold so far out: what shows that a download goes on.

Of a tar only the headers are read, each once, so a look costs some 3 us a member that came since the last.
"""

import os
from pathlib import Path

BLOCK = 512


class Staged:
    """The tars in a folder, which come, grow and are taken away."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.tar_bytes = 0
        self.images = 0
        self.image_bytes = 0
        self._known: dict[str, tuple[int, int, int]] = {}
        """Name -> where its next header is, or will be; images before it, and their bytes."""

    def look(self) -> None:
        """Counts what is there: bytes of the tars, and pictures whose header has come."""
        known: dict[str, tuple[int, int, int]] = {}
        self.tar_bytes = 0
        for path in self._folder.glob("*.tar"):
            try:
                with path.open("rb", buffering=0) as file:
                    known[path.name] = _count(file.fileno(), *self._known.get(path.name, (0, 0, 0)))
                    self.tar_bytes += os.fstat(file.fileno()).st_size
            except FileNotFoundError:  # taken away meanwhile
                continue
        self._known = known
        self.images = sum(images for _, images, _ in known.values())
        self.image_bytes = sum(image_bytes for *_, image_bytes in known.values())


def _count(descriptor: int, position: int, images: int, image_bytes: int) -> tuple[int, int, int]:
    while len(header := os.pread(descriptor, BLOCK, position)) == BLOCK:
        try:
            size = int(header[124:136].strip(b" \0") or b"0", 8)
        except ValueError:  # not written yet
            break
        if not header[0]:
            break
        # Whatever the pictures are, img2dataset calls them so here.
        if header[156:157] in (b"0", b"\0") and header[:100].rstrip(b"\0").endswith(b".jpg"):
            images, image_bytes = images + 1, image_bytes + size
        position += BLOCK + -(-size // BLOCK) * BLOCK
    return position, images, image_bytes
