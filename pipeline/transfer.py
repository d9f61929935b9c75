"""One request to a remote store, through fsspec: as a future that can be given up, with its errors told apart."""

import asyncio
import errno
import functools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec
from fsspec.callbacks import Callback

from .ingest.addresses import is_allowed, lookup

Result = TypeVar("Result")

_INSTALL = {"s3": "s3fs", "s3a": "s3fs", "http": "aiohttp requests", "https": "aiohttp requests"}
_IDENTITIES = ("ETag", "etag", "md5Hash", "generation", "content_md5", "Last-Modified", "LastModified", "mtime")


@functools.cache
def _web_settings() -> dict[str, Any]:
    """The same object each time: fsspec keeps a file system for ever for each settings that it is given."""
    import aiohttp

    redirects = aiohttp.TraceConfig()
    redirects.on_request_redirect.append(_judge_redirect)
    # aiohttp's own limit is 5 minutes a file, however fast it comes; ours is by speed. Proxies as usual.
    return {"timeout": aiohttp.ClientTimeout(total=None), "trust_env": True, "trace_configs": [redirects]}


def filesystem(url: str) -> tuple[Any, str]:
    """Returns fsspec's (file system, path in it) for a URL. Raises ValueError where its library is missing."""
    scheme = urlsplit(url).scheme
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if scheme in ("s3", "s3a"):
            # One stream a shard: parts side by side would hide how fast the bytes come.
            options["max_concurrency"] = 1
        elif scheme in ("http", "https"):
            options["client_kwargs"] = _web_settings()
        return fsspec.url_to_fs(url, **options)  # pyright: ignore[reportReturnType]  # fsspec has no types
    except ImportError as error:
        packages = _INSTALL.get(scheme)
        advice = f"pip install {packages}, or 'shortclip[remote]'" if packages else one_line(error)
        raise ValueError(f"--data {url}: {scheme}:// needs a library that is not installed: {advice}") from None
    except ValueError as error:
        raise ValueError(f"--data {url}: {one_line(error)}") from None


async def _judge_redirect(session: Any, context: Any, redirect: Any) -> None:
    """Raises where a public host sends the reader to a private address: the user named the one, not the other."""
    import aiohttp

    response = redirect.response
    target = response.url.join(type(response.url)(response.headers.get("Location") or response.headers.get("URI", "")))
    loop = asyncio.get_running_loop()

    async def is_public(host: str | None) -> bool:
        try:
            return all(map(is_allowed, await loop.run_in_executor(None, lookup, host or "")))
        except (OSError, UnicodeError):  # a proxy may know the name, we do not
            return True

    if await is_public(response.url.host) and not await is_public(target.host):
        response.close()
        why = f"redirects to {target.host}, a private address"
        raise aiohttp.ClientResponseError(response.request_info, response.history, status=403, message=why)


class Progress(Callback):
    """Counts the bytes of a transfer, and ends one that brings more than it should."""

    def __init__(self, expected: int) -> None:
        super().__init__()
        self.expected = expected
        self.abandoned = False

    def relative_update(self, inc: int = 1) -> None:
        self.value += inc
        if self.value > self.expected:
            raise OSError(f"more than the {self.expected:,} bytes that are listed")


def copying(files: Any, path: str, target: Path, progress: Progress) -> "Future[None]":
    """Starts to copy a whole file of the store to `target`."""
    if files.async_impl:
        return asyncio.run_coroutine_threadsafe(files._get_file(path, str(target), callback=progress), files.loop)

    def copy() -> None:
        with files.open(path, "rb") as source, target.open("wb") as sink:
            # An abandoned thread cannot be stopped inside a read; it must not write after it.
            while (chunk := source.read(1 << 20)) and not progress.abandoned:
                sink.write(chunk)
                progress.relative_update(len(chunk))

    return in_thread(copy)


def calling(files: Any, name: str, *arguments: Any, **options: Any) -> "Future[Any]":
    """Starts a call of one of fsspec's methods."""
    if files.async_impl:
        return asyncio.run_coroutine_threadsafe(getattr(files, f"_{name}")(*arguments, **options), files.loop)
    return in_thread(lambda: getattr(files, name)(*arguments, **options))


def in_thread(work: Callable[[], Result]) -> "Future[Result]":
    """Runs in a thread that does not keep the process alive: a store may never answer."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    future.set_running_or_notify_cancel()
    threading.Thread(target=run, daemon=True).start()
    return future


def done() -> "Future[None]":
    """Returns a future of what is already so."""
    future: Future[None] = Future()
    future.set_result(None)
    return future


def identity(info: dict[str, Any]) -> str:
    """Returns what changes when a file of the store does, "" where the store does not say."""
    return next((str(info[name]) for name in _IDENTITIES if info.get(name)), "")


def is_final(error: Exception) -> bool:
    """Whether trying again cannot help: it is not there, not allowed, or the disk is full."""
    origin = _origin(error)
    status = getattr(origin, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status not in (408, 425, 429)
    full = isinstance(origin, OSError) and origin.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or isinstance(origin, (FileNotFoundError, PermissionError))


def one_line(error: BaseException) -> str:
    """Returns what went wrong, short enough for a line."""
    error = _origin(error)
    status, message = getattr(error, "status", None), str(error)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "not there"
    if isinstance(status, int) and status >= 400:
        return f"HTTP {status} {getattr(error, 'message', '')}".rstrip()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.strerror}; lower SHORTCLIP_CACHE_GB, or name a larger disk by XDG_CACHE_HOME"
    text = " ".join((error.strerror if isinstance(error, OSError) and error.strerror else message).split())
    return text[:200] or type(error).__name__


def _origin(error: BaseException) -> BaseException:
    """fsspec calls everything that keeps it from asking after a web file FileNotFoundError, outages too."""
    cause = error.__cause__
    return cause if cause is not None and type(cause).__module__.startswith(("aiohttp", "asyncio")) else error
