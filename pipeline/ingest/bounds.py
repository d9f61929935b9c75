"""What bounds a request through the proxy: its limits, its turn at a busy host, and sockets that never wait."""

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """What one URL may cost."""

    max_bytes: int = 20_000_000
    """Of a body; of a tunnel, 64 KiB more for its handshake."""
    deadline_s: float = 30.0
    """From the client's connection to the last byte."""
    timeout_s: float = 10.0
    """Without a byte in either direction; also of each address tried, and of waiting for a busy host."""
    per_host: int = 16
    """Connections to one host at once; 0 for any number."""
    header_bytes: int = 64 << 10
    allow_loopback: bool = False
    """For people who serve their own files on this machine."""

    def __post_init__(self) -> None:
        for name in ("max_bytes", "deadline_s", "timeout_s", "header_bytes"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}; give a number above 0")
        if self.per_host < 0:
            raise ValueError(f"per_host = {self.per_host}; give 0 (any number) or more")


class Turns:
    """At most so many holders of each name at once; the others wait in line."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._holders: dict[str, int] = {}
        self._waiting: dict[str, deque[Callable[[], bool]]] = {}

    def ask(self, name: str, go: Callable[[], bool]) -> None:
        """Calls `go` when it is its turn. It returns whether it still wants it, and then gives it back."""
        if self._at_once and self._holders.get(name, 0) >= self._at_once:
            self._waiting.setdefault(name, deque()).append(go)
            return
        self._holders[name] = self._holders.get(name, 0) + 1
        if not go():
            self.give_back(name)

    def give_back(self, name: str) -> None:
        waiting = self._waiting.get(name)
        while waiting:
            go = waiting.popleft()
            if not waiting:
                del self._waiting[name]
            if go():
                return
        self._holders[name] -= 1
        if not self._holders[name]:
            del self._holders[name]


class End:
    """A socket that is not waited for, and what could not be sent to it yet.

    The loop is asked only for what changes: each of its calls is some microseconds of every request.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket, readable: Callable[[], None]) -> None:
        self.socket = sock
        self.pending = b""
        self._loop = loop
        self._number = sock.fileno()
        self._readable = readable
        self._is_reading = self._is_writing = False

    def listen(self) -> None:
        if not self._is_reading:
            self._is_reading = True
            self._loop.add_reader(self._number, self._readable)

    def deaf(self) -> None:
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._number)

    def _when_writable(self, call: Callable[[], None]) -> None:
        """Calls each time that there is room to send, until `_wrote`."""
        self._is_writing = True
        self._loop.add_writer(self._number, call)

    def _wrote(self) -> None:
        if self._is_writing:
            self._is_writing = False
            self._loop.remove_writer(self._number)

    def send(self, data: bytes, drained: Callable[[], None]) -> bool:
        """Whether all went at once; else `drained` is called when it has. Raises OSError."""
        if not self.pending:
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return True
            data = data[sent:]
            self._when_writable(lambda: self._send_pending(drained))
        self.pending += data
        return False

    def _send_pending(self, drained: Callable[[], None]) -> None:
        try:
            self.pending = self.pending[self.socket.send(self.pending) :]
        except BlockingIOError:
            return
        except OSError:
            # The socket is readable too, and says there what is wrong.
            self._wrote()
            self.listen()
            return
        if not self.pending:
            self._wrote()
            drained()

    def close(self, reset: bool = False) -> None:
        self.deaf()
        self._wrote()
        if reset:
            with contextlib.suppress(OSError):
                self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()
