"""The heads of HTTP messages as a forward proxy reads them: a request in, the request to send on; an answer likewise.

Pure functions of bytes. What is not plainly HTTP/1 is refused: two readers of one message must not see two messages.
"""

import re
from dataclasses import dataclass

_REQUEST = re.compile(rb"([A-Z]{1,20}) ([\x21-\x7e]{1,16384}) HTTP/1\.([01])")
_TARGET = re.compile(rb"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\\]*)((?:[/?][^#]*)?)(?:#.*)?")
_AUTHORITY = re.compile(rb"(?:.*@)?([A-Za-z0-9._~-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::(\d{0,5}))?", re.DOTALL)
_STATUS = re.compile(rb"HTTP/1\.[01] +([1-5]\d\d)(?: [^\r\n]*)?")

_NAME = re.compile(rb"[!-9;-~]+")
_FOLD = re.compile(rb"\r?\n[ \t]+")
_LINE_END = re.compile(rb"\r?\n")
_HEAD_END = re.compile(rb"\r?\n\r?\n")

_HOP_BY_HOP = frozenset(
    (b"connection", b"proxy-connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te",
     b"trailer", b"upgrade", b"expect", b"host")
)  # fmt: skip


class Refused(Exception):
    """A status and a reason, to be sent instead of what was asked for."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason

    def answer(self) -> bytes:
        return f"HTTP/1.1 {self.status} {self.reason}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


@dataclass(frozen=True)
class Request:
    """What a client wants of whom."""

    host: str
    port: int
    is_tunnel: bool
    """CONNECT: bytes go both ways unread."""
    is_head: bool
    head: bytes
    """The request to send on; empty for a tunnel."""


@dataclass(frozen=True)
class Response:
    """The head of an answer."""

    head: bytes
    """To send on."""
    body_bytes: int | None
    """None where the body ends otherwise than by its length."""
    is_chunked: bool


def head_bytes(data: bytes | bytearray, searched: int = 0) -> int:
    """Returns the length of a message's head with its empty line, 0 where the line has not come.

    searched: bytes that were there when it had not.
    """
    end = _HEAD_END.search(data, max(0, searched - 3))
    return end.end() if end else 0


def read_request(data: bytes) -> Request:
    """Returns what the head of a request asks for. Raises Refused."""
    first, *fields = _LINE_END.split(data.rstrip())
    line = _REQUEST.fullmatch(first)
    if line is None:
        raise Refused(400, "bad request")
    method, target, minor = line[1], line[2], line[3]
    if method == b"CONNECT":
        host, port = _authority(target, 443)
        return Request(host, port, True, False, b"")
    if method not in (b"GET", b"HEAD"):
        raise Refused(405, "method not allowed")
    parts = _TARGET.fullmatch(target)
    if parts is None:
        raise Refused(400, "bad request")
    if parts[1].lower() != b"http":
        raise Refused(403, "scheme not allowed")
    host, port = _authority(parts[2], 80)
    path = parts[3] if parts[3].startswith(b"/") else b"/" + parts[3]
    # Whoever speaks HTTP/1.0 cannot read chunks, so the server is told the same.
    lines = [
        b"%b %b HTTP/1.%b" % (method, path, minor),
        b"Host: " + parts[2].rpartition(b"@")[2],
        *(field for field, name, _ in _fields(fields) if name not in (b"content-length", b"transfer-encoding")),
        b"Connection: close\r\n\r\n",
    ]
    return Request(host, port, False, method == b"HEAD", b"\r\n".join(lines))


def read_response(data: bytes, is_head: bool) -> Response | None:
    """Returns the head of an answer, None for one that announces another (100 Continue). Raises Refused.

    The body's framing is passed on as it came. Old servers' line ends and folded lines are made plain.
    """
    first, *fields = _LINE_END.split(_FOLD.sub(b" ", data).rstrip())
    line = _STATUS.fullmatch(first)
    if line is None:
        raise Refused(502, "no HTTP")
    status = int(line[1])
    if status < 200:
        if status == 101:
            raise Refused(502, "no HTTP")
        return None
    lengths: set[bytes] = set()
    codings: list[bytes] = []
    lines = [first]
    for field, name, value in _fields(fields):
        if name == b"content-length":
            lengths.add(value)
        elif name == b"transfer-encoding":
            codings.append(value.lower())
        else:
            lines.append(field)
    is_chunked = codings == [b"chunked"]
    if codings and not is_chunked:
        raise Refused(502, "unknown coding")
    body_bytes = None
    if is_chunked:
        lines.append(b"Transfer-Encoding: chunked")
    elif lengths:
        length = lengths.pop()
        if lengths or not length.isdigit() or len(length) > 18:
            raise Refused(502, "bad length")
        body_bytes = int(length)
        lines.append(b"Content-Length: " + length)
    if is_head or status in (204, 304):
        body_bytes, is_chunked = 0, False
    lines.append(b"Connection: close\r\n\r\n")
    return Response(b"\r\n".join(lines), body_bytes, is_chunked)


def _authority(text: bytes, default_port: int) -> tuple[str, int]:
    parts = _AUTHORITY.fullmatch(text)
    if parts is None:
        raise Refused(400, "bad host")
    port = int(parts[2] or default_port)
    if not 0 < port < 65_536:
        raise Refused(403, "port not allowed")
    return parts[1].decode().strip("[]").lower(), port


def _fields(lines: list[bytes]) -> list[tuple[bytes, bytes, bytes]]:
    """The header fields that go on to the next hop: (line, name in lower case, value). What is no field is left out."""
    fields: list[tuple[bytes, bytes, bytes]] = []
    dropped = _HOP_BY_HOP
    for line in lines:
        name, colon, value = line.partition(b":")
        if not colon or not _NAME.fullmatch(name) or b"\r" in value:
            continue
        name, value = name.lower(), value.strip()
        if name == b"connection" and value != b"close":
            dropped = dropped.union(option.strip().lower() for option in value.split(b","))
        fields.append((line, name, value))
    return [field for field in fields if field[1] not in dropped]
