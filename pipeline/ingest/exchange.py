"""One request through the proxy: a client's socket in, its request judged, an address connected to, bytes handed on.

Works on sockets with the event loop's readers and writers: about 0.2 ms of CPU time a request, half of it in the
system's calls, where asyncio's streams would be felt. What is in memory is a head, or one piece of 64 KiB a direction:
the source is not read while its piece cannot be sent.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable

from .addresses import Resolver, is_web_port
from .answer import Answer, TooLarge
from .bounds import End, Limits, Turns
from .messages import Refused, Request, head_bytes, read_request
from .reach import Reach, is_own

RELAYED = "relayed"

_PIECE_BYTES = 64 << 10
_UPWARD_BYTES = 64 << 10
_SPOILT = bytes(17 << 10)
"""More than a TLS record (16.3 KiB), so that the one under way, or the next, is complete and false."""


class Exchange:
    """A client's connection, from its first byte to its close. `ended` is called once, with the exchange."""

    def __init__(self, loop: asyncio.AbstractEventLoop, limits: Limits, resolver: Resolver, turns: Turns,
                 client: socket.socket, ended: Callable[["Exchange"], None]) -> None:  # fmt: skip
        self.reason = ""
        """How it ended; "" while it goes on."""
        self.target = ""
        """The URL, or host:port of a tunnel."""
        self.started_s = self._active_s = loop.time()
        self.is_tunnel = False
        self._loop = loop
        self._limits = limits
        self._resolver = resolver
        self._turns = turns
        self._ended = ended
        self._client = End(loop, client, self._from_client)
        self._server: End | None = None
        self._read = bytearray()
        """What has come of the request's head."""
        self._upward_bytes = 0
        self._request: Request | None = None
        self._reach: Reach | None = None
        """There is one until the server's connection is."""
        self._answer: Answer | None = None
        """There is one from then on."""
        self._has_turn = False
        self._cut = ""
        """Why a tunnel is being cut."""
        self._client.listen()

    @property
    def body_bytes(self) -> int:
        """Of the answer's body, or down a tunnel."""
        return self._answer.body_bytes if self._answer else 0

    @property
    def _is_open(self) -> bool:
        """Whether it is a tunnel that is through."""
        return self.is_tunnel and self._answer is not None

    @property
    def _has_begun(self) -> bool:
        """Whether the client has some of an answer already, so that it cannot be given another."""
        return self._answer is not None and self._answer.has_begun

    # From the client

    def _from_client(self) -> None:
        try:
            data = self._client.socket.recv(_PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            enough = self._is_open or (self._answer is not None and self._answer.has_last_chunk)
            self._end(self._cut or (RELAYED if enough else "client left"), reset=True)
        elif self._request is None:
            searched = len(self._read)
            self._read += data
            length = head_bytes(self._read, searched)
            if (length or len(self._read)) > self._limits.header_bytes:
                self._refuse(Refused(431, "header too large"))
            elif length:
                self._ask(bytes(self._read[:length]))
        elif self._is_open and not self._cut:
            self._upward_bytes += len(data)
            if self._upward_bytes > _UPWARD_BYTES:
                self._cut_off("too large")
            else:
                self._up(data)

    def _ask(self, head: bytes) -> None:
        self._read.clear()
        try:
            self.target = head.split(None, 2)[1].decode("latin-1")
            self._request = read_request(head)
            self.is_tunnel = self._request.is_tunnel
            if not is_web_port(self._request.port, self.is_tunnel, self._limits.allow_loopback):
                raise Refused(403, "port not allowed")
        except Refused as refused:
            self._refuse(refused)
            return
        self._turns.ask(self._request.host, self._resolve)

    # To the server

    def _resolve(self) -> bool:
        if self.reason:
            return False
        assert self._request is not None
        self._has_turn = True
        self._active_s = self._loop.time()
        # Called by the loop in any case: what ends at once gives its turn to the next, and the line may be long.
        self._resolver.addresses(self._request.host).add_done_callback(self._resolved)
        return True

    def _resolved(self, found: "asyncio.Future[list[str]]") -> None:
        if self.reason:
            return
        if found.cancelled() or found.exception() is not None:
            self._refuse(Refused(502, "name not found"))
        elif not found.result():
            self._refuse(Refused(403, "private address"))
        else:
            assert self._request is not None
            self._reach = Reach(self._loop, found.result(), self._request.port, self._connected, self._connect)
            self._connect()

    def _connect(self) -> None:
        """Tries the next address."""
        assert self._reach is not None
        self._active_s = self._loop.time()
        if not self._reach.next():
            self._refuse(Refused(502, "cannot connect"))

    def _connected(self, sock: socket.socket) -> None:
        assert self._request is not None
        self._active_s, self._reach = self._loop.time(), None
        self._server = End(self._loop, sock, self._from_server)
        # A public address of this very machine leads to what listens here.
        try:
            is_refused = is_own(sock) and not self._limits.allow_loopback
        except OSError:
            self._refuse(Refused(502, "cannot connect"))
            return
        if is_refused:
            self._refuse(Refused(403, "private address"))
            return
        self._server.listen()
        self._answer = Answer(self._limits, self._request.is_head, self.is_tunnel)
        if self.is_tunnel:
            self._down(b"HTTP/1.1 200 Connection established\r\n\r\n")
        else:
            self._up(self._request.head)

    def _up(self, data: bytes) -> None:
        assert self._server is not None
        self._active_s = self._loop.time()
        try:
            if not self._server.send(data, self._client.listen):
                self._client.deaf()
        except OSError:
            self._broken()

    # From the server

    def _from_server(self) -> None:
        assert self._server is not None
        try:
            data = self._server.socket.recv(_PIECE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            self._broken()
            return
        self._active_s = self._loop.time()
        assert self._answer is not None
        if not data:
            self._server_closed()
            return
        try:
            passed = self._answer.take(data)
        except Refused as refused:
            self._refuse(refused)
        except TooLarge:
            self._cut_off("too large")
        else:
            if passed:
                self._down(passed)

    def _down(self, data: bytes) -> None:
        assert self._server is not None
        assert self._answer is not None
        try:
            if self._client.send(data, self._taken):
                if self._answer.is_complete:
                    self._end(RELAYED)
            else:
                self._server.deaf()
        except OSError:
            self._end("client left", reset=True)

    def _taken(self) -> None:
        """The client has all that was sent."""
        if self.reason:
            return
        self._active_s = self._loop.time()
        if self._cut or (self._answer is not None and self._answer.is_complete):
            self._end(self._cut or RELAYED)
        elif self._server is not None:
            self._server.listen()

    def _server_closed(self) -> None:
        assert self._answer is not None
        if not self._has_begun:
            self._refuse(Refused(502, "no answer"))
        else:
            # Of what is cut off, the client finds bytes missing, by length or by chunk.
            self._end(RELAYED if self._answer.is_whole_if_closed else "cut off")

    def _broken(self) -> None:
        """The server's connection is."""
        if not self._has_begun:
            self._refuse(Refused(502, "no answer"))
        else:
            self._cut_off("cut off")

    # The end

    def check(self, now_s: float) -> None:
        """Ends what takes too long."""
        late = now_s - self.started_s > self._limits.deadline_s
        if not late and now_s - self._active_s <= self._limits.timeout_s:
            return
        if self._cut:
            # A deadline that has passed is no reason not to let the client hear of it.
            if now_s - self._active_s > self._limits.timeout_s:
                self._end(self._cut, reset=True)
        elif self._reach is not None and self._reach.has_more and not late:
            self._connect()
        elif self._request is None:
            self._end("client left")
        elif not self._has_turn:
            self._refuse(Refused(503, "host busy"))
        elif not self._has_begun:
            self._refuse(Refused(504, "too slow"))
        else:
            self._cut_off("too slow")

    def abort(self) -> None:
        """Ends it because the proxy ends."""
        self._cut_off("proxy ended")
        self._end("proxy ended", reset=True)

    def _cut_off(self, reason: str) -> None:
        """Ends an answer under way so that the client cannot take it for whole, also where only its close ends it.

        A reset says so over plain HTTP. Over TLS urllib takes any end of the connection for the end of the body, so
        there the client gets a record that cannot be true.
        """
        if not self._is_open:
            self._end(reason, reset=True)
            return
        if self._server is not None:
            self._server.close()
            self._server = None
        self._cut, self._active_s = reason, self._loop.time()
        try:
            if self._client.send(_SPOILT, self._taken):
                self._end(reason)
        except OSError:
            self._end(reason)

    def _refuse(self, refused: Refused) -> None:
        """Answers in the server's stead: nothing of its answer has been sent."""
        with contextlib.suppress(OSError):
            self._client.socket.send(refused.answer())
        self._end(refused.reason)

    def _end(self, reason: str, reset: bool = False) -> None:
        """Closes both sockets."""
        if self.reason:
            return
        self.reason = reason
        self._client.close(reset)
        if self._reach is not None:
            self._reach.close()
        if self._server is not None:
            self._server.close()
        if self._has_turn:
            assert self._request is not None
            self._turns.give_back(self._request.host)
        self._ended(self)
