"""What a user or a list calls a shard set, taken apart: folders, URLs, ranges in braces. No store is asked here."""

import math
import re
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from urllib.parse import urljoin, urlsplit

MAX_LISTED = 1_000_000
_PICTURES = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_REFUSED = re.compile(
    "pipe|file|local|asynclocal|memory|data|dir|reference|generic|dask|zip|tar|libarchive|git|gist|jupyter|jlab"
    "|cached|blockcache|filecache|simplecache|async_?wrapper",
    re.IGNORECASE,
)
"""Not stores: commands, local files by another name, and wrappers round other stores."""


@dataclass(frozen=True)
class Shard:
    """A shard as its store lists it."""

    path: str
    """Of a local file, or the URL."""
    shard_bytes: int
    identity: str
    """Changes when the content does: the entity tag, or the time of a local file."""

    @property
    def name(self) -> str:
        return shard_name(self.path)


def is_remote(source: str | Path) -> bool:
    """Whether a source is named by URL. Raises ValueError for what is neither a URL nor a path."""
    if isinstance(source, Path):
        return False
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", source)
    if scheme and (_REFUSED.fullmatch(scheme[1]) or "::" in source):
        raise ValueError(f"--data {source}: {scheme[1]}: is no store of shards; give a folder, s3://... or https://...")
    return "://" in source


def shard_name(path: str) -> str:
    """Returns the file name of a shard's path or URL."""
    return (urlsplit(path).path if "://" in path else path).rpartition("/")[2]


def local_shards(folder: Path) -> list[Shard]:
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: no such folder; `python ingest.py datasets/emoji.toml --out DIR` makes one")
    paths = sorted(folder.glob("*.tar"))
    for path in paths:
        if not path.exists():
            raise ValueError(f"--data {path}: a link to nothing; bring the shard back, or remove the link")
    if not paths:
        raise ValueError(f"--data {folder}: no .tar shards in it; {_where_shards_are(folder)}")
    stats = ((path, path.stat()) for path in paths)
    return [Shard(str(path), status.st_size, str(status.st_mtime_ns)) for path, status in stats]


def _where_shards_are(folder: Path) -> str:
    """Returns what to do about a folder without shards."""
    # What is held out may lie beside what is to be trained on, so that is named first, and none is left out.
    inside = sorted({path.parent.name for path in folder.glob("*/*.tar")}, key=lambda name: (name != "train", name))
    if inside:
        more = f"; so {'have' if len(inside) > 2 else 'has'} {', '.join(inside[1:])}" if len(inside) > 1 else ""
        return f"its folder {folder / inside[0]} has some{more}"
    if (folder / "recipe.json").is_file():
        return f"`python ingest.py status {folder}` says what became of its rows"
    if any(path.suffix.lower() in _PICTURES for path in chain(folder.iterdir(), folder.glob("*/*"))):
        return f"it holds pictures: `python ingest.py folder {folder} --out DIR` makes shards of them"
    return "give the folder that holds NNNNN.tar files"


def check_url(url: str) -> None:
    parts = urlsplit(url)
    if not parts.netloc:
        raise ValueError(f"--data {url}: it names no host or bucket; write {parts.scheme}://NAME/...")
    if parts.password is not None:
        raise ValueError(
            f"--data {parts.scheme}://...@{parts.hostname}: a password in a URL ends up in logs; use ~/.netrc"
        )


_RANGE = re.compile(r"\{(\d{1,12})\.\.(\d{1,12})\}")


def expand(url: str) -> list[str]:
    """The URLs that ranges in braces stand for, {00000..00041}: as wide as they are written, both ends included."""
    spans = [(int(first), int(last), len(first)) for first, last in _RANGE.findall(url)]
    if set("{}") & set(_RANGE.sub("", url)) or any(first > last for first, last, _ in spans):
        raise ValueError(f"--data {url}: its braces are no range; write {{00000..00041}}")
    if math.prod(last - first + 1 for first, last, _ in spans) > MAX_LISTED:
        raise ValueError(f"--data {url}: its braces stand for over {MAX_LISTED:,} shards")
    pieces = _RANGE.split(url)[::3]
    numbers = product(*([f"{number:0{width}d}" for number in range(first, last + 1)] for first, last, width in spans))
    return ["".join(chain.from_iterable(zip(pieces, (*chosen, ""), strict=True))) for chosen in numbers]


def join(source: str, line: str) -> str:
    """A line of a list, relative to the list. urljoin knows no s3."""
    scheme, _, rest = source.partition("://")
    return scheme + urljoin(f"http://{rest}", line)[len("http") :]
