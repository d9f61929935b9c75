"""Shard sets in, their shards out: local folders, and remote stores through fsspec by way of a bounded local cache.

A remote shard is fetched whole, since the order reads whole windows of shards. Each attempt is held to a least speed
and to the listed length; a store that stays away, or gives another shard than was listed, stops the run with one line.
Credentials and endpoints are the store's own settings (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ~/.netrc, ...).
"""

import functools
import hashlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from .cache import CacheFull, FileCache, OpenFile
from .sources import Shard, check_url, expand, is_remote, join, local_shards
from .transfer import Progress, calling, copying, done, filesystem, identity, in_thread, is_final, one_line

Result = TypeVar("Result")

_MAX_LIST_BYTES = 256 << 20
_LISTING_THREADS = 16


class ReadFailed(ValueError):
    """The store did not give the bytes after several tries. Never a bad sample."""


def _cache_bytes() -> int:
    text = os.environ.get("SHORTCLIP_CACHE_GB", "64")
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < 1e9:
        raise ValueError(f"SHORTCLIP_CACHE_GB={text} is no size in GB; give a number above 0")
    return int(gigabytes * 1e9)


def cache_root() -> Path:
    """Returns the folder of all that can be made again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortclip"


@dataclass(frozen=True)
class Limits:
    """What a remote store may cost."""

    streams: int = 8
    """Shards that one process fetches side by side."""
    attempts: int = 6
    first_wait_s: float = 1.0
    """Before the second attempt; doubled before each further one, and spread by half so that ranks do not gang up."""
    stall_s: float = 20.0
    """An attempt ends when this long brings less than `floor_bytes_per_s`."""
    floor_bytes_per_s: float = 64 << 10
    listing_s: float = 300.0
    """The same for the list of a folder, whose pages are not seen as they come: 1,000 names each, half a second."""
    cache_bytes: int = field(default_factory=_cache_bytes)
    """Of the local cache; SHORTCLIP_CACHE_GB, else 64 GB."""
    cache_folder: Path = field(default_factory=lambda: cache_root() / "shards")


class Store:
    """Lists and opens the shards of local folders and remote stores. Safe for many threads."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.cache = _file_cache(limits.cache_folder, limits.cache_bytes)
        self._streams = threading.Semaphore(limits.streams)
        self._fetching: dict[str, Future[None]] = {}
        """Cached name -> the fetch under way. A failed one is forgotten: the store may be back."""
        self._guard = threading.Lock()
        self._warned = False

    def shards(self, source: str | Path) -> list[Shard]:
        """Returns the shards of a source in order, at least one. Raises ValueError in one line.

        source: a local folder of .tar files; the URL of such a folder; the URL of one .tar, or of several with braces
        ({00000..00041}); or the URL of a .txt file that names one shard a line, relative to it or on the same host.
        """
        if not is_remote(source):
            return local_shards(Path(source))
        source = str(source)
        check_url(source)
        path = urlsplit(source).path
        if path.endswith(".tar"):
            return self._told_apart(self._stated(source, expand(source)))
        if path.endswith(".txt"):
            return self._told_apart(self._stated(source, self._named_in(source)))
        if source.startswith(("http://", "https://")):
            raise ValueError(
                f"--data {source}: HTTP lists no folders; give .../{{00000..00041}}.tar, or the URL of a .txt file "
                "that names one shard a line"
            )
        return self._told_apart(self._listed(source))

    def open(self, path: str, shard_bytes: int, identity: str) -> OpenFile:
        """Returns a remote shard as an open local file. Raises ReadFailed in one line."""
        shard = Shard(path, shard_bytes, identity)
        if shard_bytes > self.limits.cache_bytes:
            raise ReadFailed(
                f"{path}: its {shard_bytes:,} bytes exceed the cache of {self.limits.cache_bytes:,}; "
                "raise SHORTCLIP_CACHE_GB"
            )
        try:
            return self.cache.open(_cached_name(path, identity), shard_bytes, lambda target: self._fetch(shard, target))
        except CacheFull as full:
            raise ReadFailed(f"{path}: {full}; raise SHORTCLIP_CACHE_GB") from None
        except OSError as error:
            raise ReadFailed(f"{self.cache.folder}: cannot be used as cache ({error.strerror or error})") from None

    def bring(self, shards: Iterable[tuple[str, int, str]]) -> list["Future[None]"]:
        """Starts to fetch remote shards side by side; returns when each is here. However often one is asked for
        meanwhile, it is fetched once.

        A future holds no file: a shard that it kept open could not make room for the others.
        """
        return [self._bring(*shard) for shard in shards]

    def _bring(self, path: str, shard_bytes: int, identity: str) -> "Future[None]":
        name = _cached_name(path, identity)

        def work() -> None:
            try:
                with self._streams:
                    self.open(path, shard_bytes, identity)
            finally:
                with self._guard:
                    del self._fetching[name]

        with self._guard:
            if name in self._fetching:
                return self._fetching[name]
            if self.cache.holds(name):
                return done()
            future = self._fetching[name] = in_thread(work)
            return future

    def _fetch(self, shard: Shard, target: Path) -> None:
        files, path = filesystem(shard.path)

        def attempt() -> None:
            progress = Progress(shard.shard_bytes)
            self._watched(copying(files, path, target, progress), progress)
            length = target.stat().st_size
            # Also where the length is right: a shard may be replaced by another of its size, or while it is read.
            now = identity(self._info(shard.path))
            if now and shard.identity and now != shard.identity:
                raise ReadFailed(
                    f"{shard.path}: changed since it was indexed; put the old one back, or start a new run with --out"
                )
            if length != shard.shard_bytes:
                raise OSError(f"{length:,} bytes came where {shard.shard_bytes:,} are listed")

        self._retry(shard.path, attempt)

    def _retry(self, url: str, attempt: Callable[[], Result]) -> Result:
        """What `attempt` returns, after some tries. Raises ReadFailed; says on stderr what is tried again."""
        limits, why = self.limits, ""
        for number in range(1, limits.attempts + 1):
            try:
                return attempt()
            except (ReadFailed, AssertionError, AttributeError, NameError, TypeError):
                raise
            except Exception as error:  # each store's library has errors of its own
                why = one_line(error)
                if is_final(error):
                    raise ReadFailed(f"{url}: {why}") from None
            if number == limits.attempts:
                break
            wait = limits.first_wait_s * 2 ** (number - 1) * random.uniform(0.5, 1.5)
            print(f"{url}: {why}; attempt {number} of {limits.attempts}, again in {wait:.1f} s", file=sys.stderr)
            time.sleep(wait)
        raise ReadFailed(
            f"{url}: gave up after {limits.attempts} attempts ({why}); when the store is back, run the same command"
        )

    def _watched(self, future: "Future[Result]", progress: Progress) -> Result:
        """The result of a transfer that keeps to the least speed."""
        before = 0
        while True:
            try:
                return future.result(self.limits.stall_s)
            except FutureTimeout:
                if future.done():  # a timeout of the store's own
                    raise
                now = progress.value
                if now - before < self.limits.floor_bytes_per_s * self.limits.stall_s:
                    progress.abandoned = True
                    future.cancel()
                    raise OSError(f"{now - before:,} bytes in {self.limits.stall_s:g} s") from None
                before = now

    def _answer(self, limit_s: float, files: Any, name: str, *arguments: Any, **options: Any) -> Any:
        """What one of fsspec's methods returns, within a time."""
        future = calling(files, name, *arguments, **options)
        try:
            return future.result(limit_s)
        except FutureTimeout:
            if future.done():  # a timeout of the store's own
                raise
            future.cancel()
            raise OSError(f"no answer in {limit_s:g} s") from None

    def _info(self, url: str) -> dict[str, Any]:
        files, path = filesystem(url)
        return self._answer(self.limits.stall_s, files, "info", path)

    def _stated(self, source: str, urls: Sequence[str]) -> list[Shard]:
        """The shards at URLs that the user named: each must be there and state its size."""
        if not urls:
            raise ValueError(f"--data {source}: it names no shards")

        def shard(url: str) -> Shard:
            info = self._retry(url, lambda: self._info(url))
            return _shard(url, info)

        with ThreadPoolExecutor(_LISTING_THREADS) as pool:
            try:
                return list(pool.map(shard, urls))
            except ReadFailed as failure:
                pool.shutdown(cancel_futures=True)
                raise ReadFailed(f"--data {failure}") from None

    def _named_in(self, source: str) -> list[str]:
        files, path = filesystem(source)

        def read() -> bytes:
            size = _size(self._info(source))
            if size is not None and size > _MAX_LIST_BYTES:
                raise ReadFailed(f"{source}: a list of {size:,} bytes; the limit is {_MAX_LIST_BYTES:,}")
            return self._answer(self.limits.listing_s, files, "cat_file", path)

        lines = self._retry(source, read).decode("utf-8", "replace").splitlines()
        urls: list[str] = []
        for line in map(str.strip, lines):
            if not line or line.startswith("#"):
                continue
            url = line if "://" in line else join(source, line)
            # A list is data: it may not send the reader to another machine, nor to this one's files.
            if urlsplit(url)[:2] != urlsplit(source)[:2]:
                raise ValueError(f"--data {source}: it names {line!r}, which is not on the list's own host")
            urls += expand(url)
        return urls

    def _listed(self, source: str) -> list[Shard]:
        files, path = filesystem(source)
        entries: list[dict[str, Any]] = self._retry(
            f"--data {source}", lambda: self._answer(self.limits.listing_s, files, "ls", path, detail=True)
        )
        found = {str(files.unstrip_protocol(entry["name"])): entry for entry in entries if entry["type"] == "file"}
        shards = [_shard(url, found[url]) for url in sorted(found) if url.endswith(".tar")]
        if not shards:
            raise ValueError(f"--data {source}: no .tar shards in it; give the folder that holds NNNNN.tar files")
        return shards

    def _told_apart(self, shards: list[Shard]) -> list[Shard]:
        """The same shards; says once where their store would not tell of a change."""
        unmarked = next((shard for shard in shards if not shard.identity), None)
        if unmarked and not self._warned:
            self._warned = True
            print(
                f"{unmarked.path}: its server sends neither ETag nor date, so a shard that changes is noticed only "
                "where its length does",
                file=sys.stderr,
            )
        return shards


@functools.lru_cache(maxsize=1 << 16)
def _cached_name(path: str, identity: str) -> str:
    return hashlib.sha256(f"{path}\n{identity}".encode()).hexdigest()[:32]


@functools.cache
def _file_cache(folder: Path, limit_bytes: int) -> FileCache:
    """One a process: what one index holds open must be able to make room for another's."""
    return FileCache(folder, limit_bytes)


def _size(info: dict[str, Any]) -> int | None:
    size = info.get("size")
    return int(size) if size is not None else None


def _shard(url: str, info: dict[str, Any]) -> Shard:
    size = _size(info)
    if size is None:
        raise ReadFailed(f"{url}: its server does not state its size, so a cut-off copy could not be told")
    return Shard(url, size, identity(info))
