"""One shard in, its low-resolution copy out: the same samples in the same order, with smaller images.

Every other member keeps its bytes, the json too: width and height in it are the original's. The parquet is the source's
with the copy's width and height and, for a sample that was left out, the status and the reason. One sample is held in
memory at a time, and its bytes come from the source and the options alone.
"""

import io
import json
import mmap
import tarfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .. import tar
from ..files import replacing
from ..scan import JPEG_IMAGES, MAX_IMAGE_BYTES, OTHER_IMAGES, Group, members_by_key
from .picture import TOO_MANY_BYTES, Copy, Unusable, copy_picture
from .shards import SCHEMA

FAILED = "failed_to_resize"
"""img2dataset's word for it."""

_REPORT_KEY = "shortclip.shrink"
_COLUMNS = ("key", "status", "error_message", "width", "height", "original_width", "original_height")


@dataclass(frozen=True)
class Job:
    """One shard to copy. Travels to another process."""

    source: Path
    """Its tar; the parquet beside it, if there is one, gives the columns."""
    out: Path
    """Folder for the copy."""
    short_side: int
    quality: int

    @property
    def tar(self) -> Path:
        return self.out / self.source.name

    @property
    def parquet(self) -> Path:
        return self.out / f"{self.source.stem}.parquet"


@dataclass(frozen=True)
class Report:
    """What became of a shard, or of several."""

    changes: dict[str, int] = field(default_factory=dict[str, int])
    """Copy.change -> samples."""
    left_out: dict[str, int] = field(default_factory=dict[str, int])
    """Reason -> samples."""
    bytes_before: int = 0
    """Of the tar files, as the next one."""
    bytes_after: int = 0
    problems: dict[str, str] = field(default_factory=dict[str, str])
    """Shard -> what is wrong with it as a whole."""

    @property
    def samples(self) -> int:
        """Those copied."""
        return sum(self.changes.values())


def add(reports: Iterable[Report]) -> Report:
    """Returns the sum of the reports."""
    changes: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    before = after = 0
    problems: dict[str, str] = {}
    for report in reports:
        changes.update(report.changes)
        left_out.update(report.left_out)
        before += report.bytes_before
        after += report.bytes_after
        problems |= report.problems
    return Report(_most_first(changes), _most_first(left_out), before, after, problems)


def finished(job: Job) -> Report | None:
    """Returns the report of a shard whose copy is complete, or None where it is still to be made."""
    try:
        metadata = pq.read_metadata(job.parquet).metadata or {}
        same_size = job.tar.stat().st_size
    except (OSError, pa.ArrowInvalid):
        return None
    if (record := metadata.get(_REPORT_KEY.encode())) is None:
        return None
    report = Report(**json.loads(record))
    # A source that has grown since, or a copy cut short, is made again.
    return report if (job.source.stat().st_size, same_size) == (report.bytes_before, report.bytes_after) else None


def shrink_shard(job: Job) -> Report:
    """Copies one shard: first the tar, then the parquet that makes it complete. Raises OSError where the disk does."""
    size = job.source.stat().st_size
    results: dict[str, Copy | str] = {}
    with job.source.open("rb") as source, replacing(job.tar) as file:
        # An empty file cannot be mapped.
        view = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        try:
            groups, damage = members_by_key(view)
            with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
                for key, group in groups.items():
                    results[key] = _copy_sample(view, group, out, job)
        finally:
            if isinstance(view, mmap.mmap):
                view.close()
        bytes_after = file.tell()
    table, lost = _rows(job, results, damage)
    problem = "; ".join(text for text in (damage, lost) if text)
    report = Report(
        changes=_most_first(Counter(result.change for result in results.values() if isinstance(result, Copy))),
        left_out=_most_first(Counter(result for result in results.values() if isinstance(result, str))),
        bytes_before=size,
        bytes_after=bytes_after,
        problems={job.source.name: problem} if problem else {},
    )
    metadata = {**(table.schema.metadata or {}), _REPORT_KEY: json.dumps(asdict(report))}
    with replacing(job.parquet) as file:
        pq.write_table(table.replace_schema_metadata(metadata), file)
    return report


def _copy_sample(view: mmap.mmap | bytes, group: Group, out: tarfile.TarFile, job: Job) -> Copy | str:
    """Adds a sample with its image made smaller, and returns what became of that; or adds nothing and says why."""
    by_extension = dict(reversed(group))
    if len(by_extension) < len(group):
        return "two members of the same name"
    extension = next((name for name in (*JPEG_IMAGES, *OTHER_IMAGES) if name in by_extension), None)
    if extension is None:
        return "no image"
    image = by_extension[extension]
    if image.size > MAX_IMAGE_BYTES:
        return TOO_MANY_BYTES
    try:
        jpeg, copy = copy_picture(_read(view, image), job.short_side, job.quality)
    except Unusable as reason:
        return str(reason)
    for each, member in group:
        if each != extension:
            _add(out, member.name, _read(view, member))
        elif extension in JPEG_IMAGES:
            _add(out, member.name, jpeg)
        else:
            _add(out, f"{member.name[: -len(extension)]}jpg", jpeg)
    return copy


def _read(view: mmap.mmap | bytes, member: tar.Member) -> bytes:
    return view[member.offset : member.offset + member.size]


def _add(out: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    member.uname = member.gname = "shortclip"
    out.addfile(member, io.BytesIO(content))


def _rows(job: Job, results: Mapping[str, Copy | str], damage: str | None) -> tuple[Any, str | None]:
    """The Arrow table of the copy: the source's rows, then what they do not list; and why they could not be used."""
    source = job.source.with_suffix(".parquet")
    table: Any = None
    lost: str | None = None
    if source.exists():
        # Read first: what the disk refuses is an OSError too, and no damage.
        content = source.read_bytes()
        try:
            table = pq.ParquetFile(pa.BufferReader(content)).read()
            # What would be raised when it is used: text that is not UTF-8, numbers that do not fit.
            table.validate(full=True)
            for name in set(_COLUMNS[1:]) & set(table.column_names):
                pa.array(table[name].to_pylist(), SCHEMA.field(name).type)
        except (OSError, pa.ArrowException, UnicodeDecodeError):
            table = None
            lost = f"{source.name} cannot be read, so its columns are not carried over"
        if table is not None and "key" not in table.column_names:
            table, lost = None, f"{source.name} has no column key, so its columns are not carried over"
    if table is None:
        return pa.Table.from_pylist(
            [_row({"key": key}, result) for key, result in results.items()],
            pa.schema([SCHEMA.field(name) for name in _COLUMNS]),
        ), lost
    ours = [name for name in _COLUMNS if name in table.column_names]
    rows: list[dict[str, Any]] = table.select(ours).to_pylist()
    missing = f"not in the shard: {damage}" if damage else "not in the shard"
    for row in rows:
        row["key"] = str(row["key"])
        if (result := results.get(row["key"])) is not None:
            row |= _row(row, result)
        elif row.get("status", "success") == "success":  # else it failed before, and keeps saying why
            row |= _row(row, missing)
    listed = {row["key"] for row in rows}
    extra = [_row({"key": key}, result) for key, result in results.items() if key not in listed]
    others = table.drop_columns(ours)
    if extra:
        blank = pa.Table.from_pylist([{} for _ in extra], others.schema)
        others = pa.concat_tables([others, blank])
    # In the source's order of columns, ours at the end where it has none.
    names = [*table.column_names, *(name for name in _COLUMNS if name not in ours)]
    columns = {
        name: pa.array([row.get(name) for row in (*rows, *extra)], SCHEMA.field(name).type)
        if name in _COLUMNS
        else others[name]
        for name in names
    }
    return pa.table(columns, metadata=table.schema.metadata), lost


def _row(row: Mapping[str, Any], result: Copy | str) -> dict[str, Any]:
    """The columns of a sample; what the source knows of the original's size is kept."""
    if isinstance(result, str):
        return {**row, "status": FAILED, "error_message": result}
    size = {"original_width": result.original_width, "original_height": result.original_height}
    size |= {name: row[name] for name in size if row.get(name) is not None}
    return {**row, "status": "success", "error_message": None, "width": result.width, "height": result.height, **size}


def _most_first(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))
