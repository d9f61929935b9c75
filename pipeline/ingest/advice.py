"""What a run came to in, what to do about it out: one line for where nothing was kept, and for a table not named."""

import ipaddress
from pathlib import Path
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from .fates import RETRIED, SUCCESS
from .metadata import SUFFIXES
from .passes import Summary
from .statistics import shard_parquets

_COLUMN = "does `columns` of the recipe name the right {0} column? Correct it, delete {{out}} and run again"

ADVICE = {
    "bad url": _COLUMN.format("url"),
    "scheme": _COLUMN.format("url"),
    "no caption": _COLUMN.format("caption"),
    "caption not UTF-8": "captions must be UTF-8; convert them, and give another --out",
    "caption too long": _COLUMN.format("caption"),
    "private address": "private addresses are never asked, with --retry neither: the URLs must be of the public web",
    "not found": "the pictures are gone; take newer metadata",
    "refused by the server": "the servers let nobody in who asks so; take other metadata",
    "certificate": "does this machine trust the usual authorities (ca-certificates), and is its clock right?",
    "opt-out": "their sites keep pictures out of training; take other metadata",
    "too many requests": "ask later and more gently: the same command with --retry --per-host 2",
    "hash mismatch": "is hash_kind the kind of the column `hash`, and that of the picture files?",
    "too small": "a side is under min_image_size (--min-image-size); lower it, and give another --out",
    "too long": "sides differ by over max_aspect_ratio (--max-aspect-ratio); raise it, and give another --out",
    "no such file": "paths that are not absolute start at the table's folder; correct them, and give another --out",
    "outside the folder": "give the folder that holds all pictures as PICTURES, and another --out",
}
"""Fate -> what to do where it is the commonest and nothing was kept; `{out}` is the run's folder."""

_LOOPBACK = (
    "these URLs are of this machine; to ask it, delete {out} and run the same command with --allow-loopback (what was "
    "refused is not asked again, with --retry neither)"
)
_OFFLINE = "is this machine on the web, and does its name server answer? Then: the same command with --retry"
_NO_CAPTIONS = (
    "put each caption into the .txt file of its picture's name, or all into a table for --metadata; then delete {out}"
)
_OTHER = "error_message in {out}/*.parquet says more"
_TABLE = "{table} lies there: if it holds the captions, delete {out} and add --metadata {table}"
_OF_OWN = {
    "no caption": (
        "fill the captions of these samples (a table's column, or each sample's .txt), and give another --out"
    ),
    "caption too long": "shorten these captions, and give another --out",
}
"""As ADVICE, for own data, which no recipe describes."""


def nothing_kept(summary: Summary, out: Path, own: bool = False, bare: Path | None = None) -> str:
    """Returns why no row is in a shard, the commonest reason, and what to do, in one line.

    own: the pictures are the user's own. bare: their folder, where no table of captions was named.
    """
    fate, number = next(((fate, number) for fate, number in summary.fates.items() if fate != SUCCESS), ("", 0))
    share = "all" if number == summary.rows else f"{number:,} of"
    advice = ADVICE.get(fate, _OFFLINE if fate in RETRIED else _OTHER)
    table = None
    if fate == "private address" and _asks_this_machine(out):
        advice = _LOOPBACK
    elif fate == "no caption" and bare is not None:
        table = table_in(bare)
        advice = _NO_CAPTIONS if table is None else _TABLE
    elif own and fate in _OF_OWN:
        advice = _OF_OWN[fate]
    said = advice.format(out=out, table=table)
    return f"nothing was kept: of {share} {summary.rows:,} rows it is `{fate}`; {said}"


def unread_table(source: Path, out: Path) -> str | None:
    """Returns what to say where a folder of pictures without caption files holds a table that no flag names."""
    if (table := table_in(source)) is None:
        return None
    return f"note: no picture has a caption file, and {_TABLE.format(table=table, out=out)}"


def table_in(folder: Path) -> Path | None:
    """Returns the first file in a folder, or in a folder of it, that could be a table of captions."""
    found = (path for pattern in ("*", "*/*") for path in sorted(folder.glob(pattern)))
    return next((path for path in found if path.suffix in SUFFIXES and path.is_file() and path.name[0] != "."), None)


def _asks_this_machine(out: Path) -> bool:
    """Whether URLs that were refused as private are of this machine, in the first shard that has any."""
    for path in shard_parquets(out):
        rows = pq.read_table(path, columns=["url", "status"]).to_pylist()
        if urls := [row["url"] for row in rows if row["status"] == "private address"]:
            return any(is_loopback(url) for url in urls)
    return False


def is_loopback(url: str) -> bool:
    """Returns whether a URL names this machine, by an address of loopback or as localhost."""
    try:
        host = urlsplit(url).hostname or ""
        return host == "localhost" or host.endswith(".localhost") or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
