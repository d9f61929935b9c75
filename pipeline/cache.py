"""Whole files of a remote store, kept in a local folder of bounded size that several processes may share.

Who has a file open holds a lock on it, which the kernel drops with the process, however it ends: so nothing in use is
ever evicted, a killed download is found and removed, and two processes never fetch the same file twice.
"""

import fcntl
import os
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

_SUFFIX = ".shard"
_PARTIAL = ".partial"
_WAIT_S = 0.05
_IDLE_S = 10.0
"""A file that was not read for so long is let go, so that another process may evict it."""
_AGAIN_S = 60.0


class CacheFull(Exception):
    """What is in use leaves no room; the message says how much there is."""


class OpenFile:
    """An open file that closes when its last reader lets go: evicting one never pulls it from under a read."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.last_used = time.monotonic()

    def __del__(self) -> None:
        os.close(self.descriptor)


class FileCache:
    """At most `limit_bytes` of files in `folder`, the least recently used evicted first. Safe for many threads."""

    def __init__(self, folder: Path, limit_bytes: int, max_open: int = 256, full_wait_s: float = 3 * _IDLE_S) -> None:
        """full_wait_s: how long to wait for other processes to let go of what they hold."""
        self.folder, self.limit_bytes, self.max_open, self.full_wait_s = folder, limit_bytes, max_open, full_wait_s
        self._held: OrderedDict[str, OpenFile] = OrderedDict()
        """The files this process has open, the least recently used first."""
        self._let_go: dict[str, float] = {}
        """When files that had to make room for others were last used."""
        self._num_fetching = 0
        self._warned = False
        self._guard = threading.Lock()

    def open(self, name: str, size: int, fetch: Callable[[Path], None]) -> OpenFile:
        """Returns the file `name`, open; where it is not here yet, `fetch` writes its `size` bytes to a path.

        The name must change when the content does. Raises what `fetch` raises, and CacheFull.
        """
        with self._guard:
            if held := self._held.get(name):
                return self._use(name, held)
        opened = self._obtain(name, size, fetch)
        with self._guard:
            return self._use(name, self._held.setdefault(name, opened))

    def holds(self, name: str) -> bool:
        """Whether this process has the file open."""
        return name in self._held

    def _use(self, name: str, held: OpenFile) -> OpenFile:
        now = held.last_used = time.monotonic()
        self._held.move_to_end(name)
        while len(self._held) > self.max_open or next(iter(self._held.values())).last_used < now - _IDLE_S:
            self._held.popitem(last=False)
        return held

    def release(self) -> None:
        """Lets go of the files that nobody is reading from just now."""
        with self._guard:
            self._held.clear()

    def _obtain(self, name: str, size: int, fetch: Callable[[Path], None]) -> OpenFile:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}{_SUFFIX}"
        # The size stands in the name: it counts in full from the start, or two processes could both find room.
        partial = self.folder / f"{name}.{size}{_PARTIAL}"
        give_up = time.monotonic() + self.full_wait_s
        while True:
            with self._folder_lock():
                if (descriptor := _open_shared(path)) is not None:
                    os.utime(descriptor)  # the time of the last use, by which files are evicted
                    return OpenFile(descriptor)
                self._warn_of_thrashing(name)
                if _in_use(partial):  # being fetched by another thread or process
                    give_up = time.monotonic() + self.full_wait_s
                elif self._make_room(size):
                    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC)
                    fcntl.flock(descriptor, fcntl.LOCK_EX)
                    break
                elif self._num_fetching:  # this process takes up room itself, and frees it when it has read
                    give_up = time.monotonic() + self.full_wait_s
            if time.monotonic() > give_up:
                raise CacheFull(f"no room for {size:,} bytes in {self.folder} ({self.limit_bytes:,} bytes, all in use)")
            time.sleep(_WAIT_S)
        opened = OpenFile(descriptor)
        with self._guard:
            self._num_fetching += 1
        try:
            fetch(partial)
            assert os.fstat(descriptor).st_size == size, "what is not whole must not take its name"
            # Under the lock: who lists the folder meanwhile could see neither name.
            with self._folder_lock():
                partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        finally:
            with self._guard:
                self._num_fetching -= 1
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return opened

    def _make_room(self, size: int) -> bool:
        """Evicts until `size` more bytes fit; first what nobody has open, then what this process has."""
        entries = sorted(_entries(self.folder))
        used = sum(entry_bytes for _, entry_bytes, _ in entries)
        for _, entry_bytes, path in entries:
            if used + size <= self.limit_bytes:
                return True
            used -= entry_bytes if _evict(path) else 0
        while used + size > self.limit_bytes:
            with self._guard:
                if not self._held:
                    return False
                name, held = self._held.popitem(last=False)
            path, entry_bytes = self.folder / f"{name}{_SUFFIX}", os.fstat(held.descriptor).st_size
            self._let_go[name] = held.last_used
            del held
            used -= entry_bytes if _evict(path) else 0
        return True

    def _warn_of_thrashing(self, name: str) -> None:
        last_used = self._let_go.pop(name, None)
        if last_used is not None and time.monotonic() < last_used + _AGAIN_S and not self._warned:
            self._warned = True
            print(
                f"{self.folder}: its {self.limit_bytes:,} bytes are fewer than the files that are read side by side, "
                "so these are fetched again and again; raise SHORTCLIP_CACHE_GB",
                file=sys.stderr,
            )

    @contextmanager
    def _folder_lock(self) -> Generator[None]:
        with (self.folder / ".lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _entries(folder: Path) -> Generator[tuple[int, int, Path]]:
    """The (time of last use, bytes, path) of each file of the cache; files of other names are none of its business."""
    for entry in os.scandir(folder):
        stem, suffix = os.path.splitext(entry.name)
        listed_bytes = stem.rpartition(".")[2]
        if suffix != _SUFFIX and not (suffix == _PARTIAL and "." in stem and listed_bytes.isdecimal()):
            continue
        try:
            status = entry.stat()
        except FileNotFoundError:
            continue
        yield status.st_mtime_ns, int(listed_bytes) if suffix == _PARTIAL else status.st_size, Path(entry)


def _open_shared(path: Path) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor


def _in_use(path: Path) -> bool:
    """Whether a living process, this one included, has the file open."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False


def _evict(path: Path) -> bool:
    if _in_use(path):
        return False
    path.unlink(missing_ok=True)
    return True
