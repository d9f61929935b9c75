"""What a server sends for one request: bytes in, bytes to hand on out. Knows nothing of sockets or of time.

The head is judged before any of it is handed on; a body is counted, and nothing beyond its stated length is passed.
"""

from .bounds import Limits
from .messages import Refused, Response, head_bytes, read_response

_HANDSHAKE_BYTES = 64 << 10
_LAST_CHUNK = b"0\r\n\r\n"


class TooLarge(Exception):
    """A body grew over the limit when its beginning was handed on already."""


class Answer:
    """An answer as it comes, or what comes down a tunnel, which has no head."""

    def __init__(self, limits: Limits, is_head: bool, is_tunnel: bool) -> None:
        """is_head: it answers HEAD, which gets no body."""
        self.body_bytes = 0
        """Of the body, or down the tunnel."""
        self.has_begun = is_tunnel
        """Whether there is something to hand on."""
        self.is_complete = False
        """Whether the length that was stated is there; a body without one ends with its connection."""
        self._limits = limits
        self._is_head = is_head
        self._is_tunnel = is_tunnel
        self._read = bytearray()
        """What has come of a head."""
        self._early_bytes = 0
        """Of heads that announced another."""
        self._response: Response | None = None
        self._tail = b""

    @property
    def has_last_chunk(self) -> bool:
        """Whether a body in chunks has ended; what may follow is trailers."""
        return self._tail == _LAST_CHUNK

    @property
    def is_whole_if_closed(self) -> bool:
        """Whether a connection that closes now has brought all there is, so far as that can be told."""
        if self._is_tunnel:
            return True
        if self._response is None:
            return False
        if self._response.is_chunked:
            return self.has_last_chunk
        return self._response.body_bytes is None or self.is_complete

    def take(self, data: bytes) -> bytes:
        """Returns what to hand on of what has come. Raises Refused before anything was, TooLarge after."""
        if self.has_begun:
            return self._body(data)
        searched = len(self._read)
        self._read += data
        while length := head_bytes(self._read, searched):
            if length + self._early_bytes > self._limits.header_bytes:
                break
            head = bytes(self._read[:length])
            del self._read[:length]
            response = read_response(head, self._is_head)
            if response is None:
                self._early_bytes += length
                searched = 0
                continue
            if (response.body_bytes or 0) > self._limits.max_bytes:
                raise Refused(413, "too large")
            self._response, self.has_begun = response, True
            rest = bytes(self._read)
            self._read.clear()
            return response.head + self._body(rest)
        if len(self._read) + self._early_bytes > self._limits.header_bytes:
            raise Refused(502, "header too large")
        return b""

    def _body(self, data: bytes) -> bytes:
        limit, response = self._limits.max_bytes, self._response
        if response is None:
            limit += _HANDSHAKE_BYTES
        elif response.body_bytes is not None:
            data = data[: response.body_bytes - self.body_bytes]
            self.is_complete = response.body_bytes == self.body_bytes + len(data)
        elif response.is_chunked:
            self._tail = (self._tail + data[-5:])[-5:]
        self.body_bytes += len(data)
        if self.body_bytes > limit:
            raise TooLarge
        return data
