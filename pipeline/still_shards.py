"""Tars of pictures in the layout of clip_benchmark: KEY.jpg, png or webp beside KEY.cls, or beside KEY.txt.

Unlike training shards they need no JPEGs and no captions, and are read once, so nothing is indexed.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .scan import JPEG_IMAGES, MAX_CAPTION_BYTES, OTHER_IMAGES, members_by_key
from .stills import Still
from .tar import Member

_IMAGES = (*JPEG_IMAGES, *OTHER_IMAGES)


@dataclass(frozen=True)
class StillSample:
    """A picture of a tar, and what is said of it there."""

    still: Still
    class_id: int
    """-1 where it has none."""
    captions: tuple[bytes, ...]
    """The lines of its txt that are not blank."""


def tar_samples(tars: Sequence[Path]) -> tuple[list[StillSample], list[str]]:
    """Returns the samples that have a picture, tar by tar; and for each damaged tar where it is cut off, as a phrase.

    Raises ValueError for a class that is no number, and where there is not one picture.
    """
    samples: list[StillSample] = []
    damaged: list[str] = []
    for path in tars:
        if not path.stat().st_size:  # an empty file cannot be mapped
            damaged.append(f"{path}: an empty file")
            continue
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            groups, problem = members_by_key(view)
            for key, group in groups.items():
                if (sample := _sample(path, key, dict(reversed(group)), view)) is not None:
                    samples.append(sample)
        if problem is not None:
            damaged.append(f"{path}: {problem}")
    if not samples:
        raise ValueError(f"{tars[0].parent}: no picture in its {len(tars)} tars; each needs a KEY.jpg, .png or .webp")
    return samples, damaged


def _sample(path: Path, key: str, members: dict[str, Member], view: mmap.mmap) -> StillSample | None:
    image = next((name for name in _IMAGES if name in members), None)
    if image is None:
        return None
    label = _content(members.get("cls"), view, 32).strip()
    if label and not label.isdigit():
        raise ValueError(f"{path}: {key}.cls holds {label.decode('utf-8', 'replace')!r}, which is no class number")
    lines = _content(members.get("txt"), view, 16 * MAX_CAPTION_BYTES).splitlines()
    member = members[image]
    return StillSample(
        Still(path, member.offset, member.size, f"{key}.{image}"),
        int(label) if label else -1,
        tuple(line.strip() for line in lines if line.strip()),
    )


def _content(member: Member | None, view: mmap.mmap, limit: int) -> bytes:
    return b"" if member is None else view[member.offset : member.offset + min(member.size, limit)]
