"""A host's addresses in, a connected socket out: one address after another, never waiting for any."""

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence

ADDRESSES_TRIED = 4


class Reach:
    """Tries addresses in turn, each when `next` is called: `reached` gets the socket, or `failed` is called."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        addresses: Sequence[str],
        port: int,
        reached: Callable[[socket.socket], None],
        failed: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._addresses = list(addresses[:ADDRESSES_TRIED])
        self._port = port
        self._reached = reached
        self._failed = failed
        self._socket: socket.socket | None = None

    @property
    def has_more(self) -> bool:
        return bool(self._addresses)

    def next(self) -> bool:
        """Gives the address under way up for the next one; returns whether there is one."""
        self.close()
        while self._addresses:
            address = self._addresses.pop(0)
            sock = None
            try:
                sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                code = sock.connect_ex((address, self._port))
            except OSError as error:
                code = error.errno
            if sock is not None and code in (0, errno.EINPROGRESS):
                self._socket = sock
                self._loop.add_writer(sock.fileno(), self._writable)
                return True
            if sock is not None:
                sock.close()
        return False

    def close(self) -> None:
        """Gives up the address under way."""
        if self._socket is not None:
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._socket = None

    def _writable(self) -> None:
        assert self._socket is not None
        if self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._failed()
            return
        sock, self._socket = self._socket, None
        self._loop.remove_writer(sock.fileno())
        self._reached(sock)


def is_own(sock: socket.socket) -> bool:
    """Returns whether a connection leads to this very machine, by whatever address. Raises OSError where it is gone."""
    return sock.getsockname()[0] == sock.getpeername()[0]
