"""A work list and the pictures of its rows in, a shard that training can trust out.

Each picture is decoded once, by which it is proved; what comes out is upright RGB JPEG of the recipe's size. Every row
of the list stands in the shard's parquet with its fate in `status`: `success`, or why it is not in the tar. The tar is
renamed when it is whole and the parquet follows, so a shard whose parquet exists is complete. About 7 ms a picture of
600 x 800 at 256 px.
"""

import hashlib
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from PIL import Image

from ..files import replacing
from .blur import blur_boxes
from .fates import RETRIED, SUCCESS, of_picture
from .fetched import Fetched, Missing, Own, opened
from .picture import FORMATS, MAX_JPEG_SIDE, Copy, Retouch, Unusable, copy_picture
from .shards import PICTURE_COLUMNS, writing_tar
from .web_recipe import ResizeMode, WebRecipe

REPORT_KEY = b"shortclip.ingest"

_OURS = (
    *PICTURE_COLUMNS,
    ("change", pa.string()),
    ("attempt", pa.int32()),
    ("previous_status", pa.string()),
)


@dataclass(frozen=True)
class Rules:
    """What a picture must be, and what is made of it."""

    image_size: int
    resize_mode: ResizeMode
    jpeg_quality: int
    min_image_size: int
    max_aspect_ratio: int
    hash_kind: str

    @classmethod
    def of(cls, recipe: WebRecipe, shrink: int | None) -> "Rules":
        """shrink: the short side that replaces the recipe's size."""
        size, mode = (recipe.image_size, recipe.resize_mode) if shrink is None else (shrink, "keep_ratio")
        return cls(
            size, mode, recipe.jpeg_quality, recipe.min_image_size, recipe.max_aspect_ratio, recipe.hash_kind
        )  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One work list to turn into a shard. Travels to another process."""

    work_list: Path
    staged: Path | None
    """What img2dataset made of it, without the suffix; None where there was nothing to download."""
    out: Path
    shard_id: int
    attempt: int
    """The pass over the web, from 1."""
    rules: Rules
    license: str
    cut: Mapping[str, str] = field(default_factory=dict[str, str])
    """URL -> why the proxy broke its answer off."""
    own: Own | None = None
    """Where the pictures of own data lie; None: they were downloaded."""

    @property
    def tar(self) -> Path:
        return self.out / f"{self.shard_id:05d}.tar"

    @property
    def parquet(self) -> Path:
        return self.out / f"{self.shard_id:05d}.parquet"


@dataclass(frozen=True)
class Report:
    """What became of a shard's rows."""

    fates: dict[str, int]
    """Fate -> rows."""
    previous: dict[str, int] = field(default_factory=dict[str, int])
    """Of rows that were tried before: their fate then -> rows."""
    downloaded_bytes: int = 0
    """Of the pictures as they came, or were read."""
    shard_bytes: int = 0
    """Of the tar; 0 where no row was successful, and there is none."""

    @property
    def rows(self) -> int:
        return sum(self.fates.values())


def finished(parquet: Path) -> Report | None:
    """Returns the report of a complete shard, or None where it is still to be made."""
    try:
        metadata = pq.read_metadata(parquet).metadata or {}
        report = Report(**json.loads(metadata[REPORT_KEY]))
        whole = not report.shard_bytes or parquet.with_suffix(".tar").stat().st_size == report.shard_bytes
    except (OSError, KeyError, pa.ArrowInvalid):
        return None
    return report if whole else None


def accept(job: Job) -> Report:
    """Writes the shard of a list, the tar first, and returns what became of its rows. Raises OSError where disks do."""
    table = pq.read_table(job.work_list)
    rows: list[dict[str, Any]] = table.to_pylist()
    results = [_blank(job, row) for row in rows]
    downloaded = shard_bytes = 0
    if any(row["status"] is None for row in rows):
        with opened(job.staged, job.cut, job.own) as fetched, writing_tar(job.tar) as out:
            for i, (row, result) in enumerate(zip(rows, results, strict=True)):
                if row["status"] is None:
                    downloaded += _add(out, f"{job.shard_id:05d}{i:04d}", row, result, fetched, job)
    fates = Counter(str(result["status"]) for result in results)
    if fates[SUCCESS]:
        shard_bytes = job.tar.stat().st_size
    else:
        job.tar.unlink(missing_ok=True)
    previous = Counter(str(row["previous_status"]) for row in rows) if "previous_status" in table.column_names else {}
    report = Report(dict(fates.most_common()), dict(previous), downloaded, shard_bytes)
    _write(job, table, results, report)
    return report


def _blank(job: Job, row: Mapping[str, Any]) -> dict[str, Any]:
    blank: dict[str, Any] = {name: None for name, _ in _OURS}
    known = {name: row.get(name) for name in ("status", "error_message", "previous_status")}
    return blank | known | {"attempt": job.attempt}


def _add(
    out: Any, key: str, row: Mapping[str, Any], result: dict[str, Any], fetched: Fetched, job: Job
) -> int:  # fmt: skip
    """Adds a row's sample to the tar, or says in `result` why not; returns the bytes of the picture as it came."""
    try:
        image = fetched.image(row)
    except Missing as missing:
        result |= {"status": missing.fate, "error_message": str(missing)}
        return 0
    result["sha256"] = hashlib.sha256(image).hexdigest()
    kind = job.rules.hash_kind
    if kind:
        digest = result["sha256"] if kind == "sha256" else hashlib.new(kind, image).hexdigest()
        if (expected := str(row["hash"] or "").lower()) != digest:
            result |= {"status": "hash mismatch", "error_message": f"{digest} is not {expected or 'given'}"}
            return len(image)
    try:
        jpeg, copy = make_picture(image, job.rules, row.get("face_boxes") or [])
    except Unfit as unfit:
        result |= {"status": unfit.fate, "error_message": str(unfit)}
        return len(image)
    except Unusable as reason:
        result |= {"status": of_picture(str(reason)), "error_message": str(reason)}
        return len(image)
    result |= {
        "status": SUCCESS,
        "width": copy.width,
        "height": copy.height,
        "original_width": copy.original_width,
        "original_height": copy.original_height,
        "change": copy.change,
    }
    details = {name: _plain(value) for name, value in {**row, **result}.items() if name not in _NOT_IN_JSON}
    details |= {"key": key, "license": job.license}
    members, known = fetched.extras(row)
    if not job.license and "license" in known:
        details["license"] = known["license"]
    text = json.dumps({**known, **details}, ensure_ascii=False, default=str).encode()
    out.write({"__key__": key, **members, "jpg": jpeg, "txt": row["caption"].encode(), "json": text})
    return len(image)


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


_NOT_IN_JSON = frozenset(("error_message", "previous_status", "attempt", "change", "face_boxes", "members", "own_file"))
_NOT_IN_PARQUET = frozenset(("members", "own_file"))


class Unfit(Unusable):
    """A picture that could be decoded and is not wanted."""

    def __init__(self, fate: str, reason: str) -> None:
        super().__init__(reason)
        self.fate = fate


def make_picture(image: bytes, rules: Rules, face_boxes: list[list[float]]) -> tuple[bytes, Copy]:
    """Returns the JPEG that goes into the shard, and what it is. Raises Unusable."""
    width, height, is_grey = _header(image)
    short, long = min(width, height), max(width, height)
    if short and short < rules.min_image_size:
        raise Unfit("too small", f"a side of {short} pixels")
    if long > rules.max_aspect_ratio * short:
        raise Unfit("too long", f"{width} x {height}")
    side = {
        "keep_ratio": rules.image_size,
        "keep_ratio_largest": max(1, rules.image_size * short // long) if long else rules.image_size,
        "no": MAX_JPEG_SIDE,
    }[rules.resize_mode]
    retouch: Retouch | None = None
    if face_boxes:
        if not all(len(box) == 4 and all(map(math.isfinite, box)) for box in face_boxes):
            raise Unfit("bad face boxes", "a box that is not four numbers")
        retouch = partial(blur_boxes, boxes=face_boxes)
    elif is_grey:
        retouch = _same
    return copy_picture(image, side, rules.jpeg_quality, retouch)


def _header(image: bytes) -> tuple[int, int, bool]:
    """The width and height that the head of a file tells, 0 where none can be read, and whether it is a grey JPEG."""
    try:
        if image[:3] == b"\xff\xd8\xff":
            height, width, colours, *_ = simplejpeg.decode_jpeg_header(image, strict=False)
            return int(width), int(height), colours == "Gray"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
                return *opened.size, False
    except Exception:  # what is wrong with it is said by whoever decodes it
        return 0, 0, False


def _same(picture: Image.Image) -> Image.Image:
    return picture


def _write(job: Job, table: Any, results: list[dict[str, Any]], report: Report) -> None:
    keys = pa.array([f"{job.shard_id:05d}{i:04d}" for i in range(table.num_rows)])
    ours = {name: pa.array([result[name] for result in results], kind) for name, kind in _OURS}
    theirs = {name: table[name] for name in table.column_names if name not in ours and name not in _NOT_IN_PARQUET}
    columns = {"key": keys, **theirs, **ours}
    metadata = {REPORT_KEY: json.dumps(asdict(report)).encode()}
    with replacing(job.parquet) as file:
        pq.write_table(pa.table(columns, metadata=metadata), file)


def retryable(parquet: Path) -> Any:
    """Returns the rows of a shard that may go well another time, as rows of a work list."""
    table = pq.read_table(parquet)
    mask = pa.array([status in RETRIED for status in table["status"].to_pylist()])
    rows = table.filter(mask)
    dropped = [name for name, _ in _OURS if name in rows.column_names] + ["key"]
    blank = pa.nulls(rows.num_rows, pa.string())
    work = rows.drop_columns(dropped).append_column("status", blank)
    return work.append_column("previous_status", rows["status"]).replace_schema_metadata(None)
