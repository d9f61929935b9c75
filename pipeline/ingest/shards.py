"""Samples in, webdataset shards out, in the layout that img2dataset writes: NNNNN.tar and NNNNN.parquet.

A shard is complete when its parquet exists: the tar is written under another name, renamed when whole, and the parquet
follows. So work that was killed is redone by the shard, and the bytes depend on nothing but the samples.
"""

import hashlib
import json
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..files import replacing
from .engine import run

Plan = TypeVar("Plan")

PICTURE_COLUMNS = (
    ("status", pa.string()),
    ("error_message", pa.string()),
    ("width", pa.int32()),
    ("height", pa.int32()),
    ("original_width", pa.int32()),
    ("original_height", pa.int32()),
    ("sha256", pa.string()),
)
"""What img2dataset says of each picture."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        *PICTURE_COLUMNS,
        ("license", pa.string()),
        ("style", pa.string()),
        ("name", pa.string()),
    ]
)
"""img2dataset's columns, then ours."""


@dataclass(frozen=True)
class Sample:
    """One image-text pair and what is known of it."""

    jpeg: bytes
    width: int
    height: int
    caption: str
    url: str
    """Where the picture is from."""
    license: str
    """SPDX name."""
    style: str
    name: str | None = None
    """Of the one thing shown; None for a scene."""
    other_captions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Word -> caption, stored as KEY.word.txt."""
    class_id: int | None = None
    """Stored as KEY.cls."""
    details: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Anything else for KEY.json."""


@dataclass(frozen=True)
class Shard(Generic[Plan]):
    """One shard to write: `draw` makes the sample of each plan. Both travel to another process."""

    folder: Path
    shard_id: int
    plans: Sequence[Plan]
    draw: Callable[[Plan], Sample]

    @property
    def tar(self) -> Path:
        return self.folder / f"{self.shard_id:05d}.tar"

    @property
    def parquet(self) -> Path:
        return self.folder / f"{self.shard_id:05d}.parquet"

    @property
    def complete(self) -> bool:
        return self.parquet.exists() and self.tar.exists()


def split_shards(
    folder: Path, plans: Sequence[Plan], draw: Callable[[Plan], Sample], samples_per_shard: int
) -> list[Shard[Plan]]:
    """Returns the shards of a list of plans, in order; all but the last are full."""
    starts = range(0, len(plans), samples_per_shard)
    return [Shard(folder, i, plans[start : start + samples_per_shard], draw) for i, start in enumerate(starts)]


def write_shards(shards: Sequence[Shard[Any]], workers: int, done: Callable[[Shard[Any]], None]) -> None:
    """Writes the shards that are not complete, `workers` at a time, and calls `done` after each.

    The bytes do not depend on `workers`. Raises what `draw` raises, and ValueError when a worker process dies.
    """
    pending = [shard for shard in shards if not shard.complete]
    for folder in {shard.folder for shard in pending}:
        folder.mkdir(parents=True, exist_ok=True)
        clear_left_overs(folder)
    run(write_shard, pending, workers, lambda shard, _: done(shard))


def clear_left_overs(folder: Path) -> None:
    """Removes what a killed run had not finished. Only for a folder that this process alone writes to."""
    for left_over in folder.glob("*.partial"):
        left_over.unlink(missing_ok=True)


@contextmanager
def writing_tar(path: Path) -> Generator[Any]:
    """Gives webdataset's writer of a tar that takes its name when it is whole; equal samples make equal bytes."""
    # Imported here: it brings torch along, which only the processes that write need.
    from webdataset.writer import TarWriter

    with (
        replacing(path) as file,
        TarWriter(file, user="shortclip", group="shortclip", mode=0o644, mtime=0, encoder=False) as tar,
    ):
        yield tar


def write_shard(shard: Shard[Any]) -> None:
    """Writes one shard: KEY.jpg, KEY.json and KEY.txt side by side, a key being the shard and the row in it."""
    rows: list[dict[str, Any]] = []
    with writing_tar(shard.tar) as tar:
        for row, plan in enumerate(shard.plans):
            sample = shard.draw(plan)
            key = f"{shard.shard_id:05d}{row:04d}"
            rows.append(_columns(key, sample))
            tar.write({"__key__": key, **_members(rows[-1], sample)})
    with replacing(shard.parquet) as file:
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)


def _columns(key: str, sample: Sample) -> dict[str, Any]:
    return {
        "key": key,
        "url": sample.url,
        "caption": sample.caption,
        "status": "success",
        "error_message": None,
        "width": sample.width,
        "height": sample.height,
        "original_width": sample.width,
        "original_height": sample.height,
        "sha256": hashlib.sha256(sample.jpeg).hexdigest(),
        "license": sample.license,
        "style": sample.style,
        "name": sample.name,
    }


def _members(columns: Mapping[str, Any], sample: Sample) -> dict[str, bytes]:
    captions = [sample.caption, *sample.other_captions.values()]
    details = {**columns, "captions": captions, **sample.details}
    members = {
        "jpg": sample.jpeg,
        "txt": sample.caption.encode(),
        "json": json.dumps(details, ensure_ascii=False).encode(),
    }
    members |= {f"{word}.txt": caption.encode() for word, caption in sample.other_captions.items()}
    if sample.class_id is not None:
        members["cls"] = str(sample.class_id).encode()
    return members
