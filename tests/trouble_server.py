"""A web on loopback: thousands of small distinct pictures, and some fifty URLs that each make one kind of trouble.

    python tests/trouble_server.py --port 0 --pictures 3000 [--metadata FILE.parquet]

prints `listening on http://127.0.0.1:PORT` when the pictures are drawn, and serves until its stdin closes. In a test:

    with serving(pictures=100) as web:
        rows = web.rows()                      # pictures, then troubles; web.url is the server's own
        write_metadata(path, rows)             # parquet: url, caption, name
        web.reset()                            # what fails only once fails again

A `Row` says what must become of it. `outcome` holds every state that is right: "kept" (a sample is in a shard), or a
reason of these: "status" (HTTP error), "too slow", "too large", "cut off", "redirect", "private address", "scheme",
"port", "bad url", "opt-out", "empty", "not an image", "damaged", "too many pixels", "too small", "too long" (aspect),
"mode" (16 bits, CMYK, ... where they are not converted), "animated", "caption", "duplicate". `error` is a regular
expression for what urllib raises when it asks for the URL through pipeline.ingest.proxy; "" where bytes arrive.

`pixels` is the size that a kept picture has, upright: (width, height). Pictures are drawn from their number alone, so
`picture(7)` is what /pictures/7.jpg serves.
"""

import argparse
import asyncio
import contextlib
import functools
import gzip
import io
import struct
import sys
import threading
import zlib
from collections.abc import Awaitable, Callable, Generator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

KEPT = frozenset({"kept"})
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
SIZES = ((160, 120), (120, 160), (200, 200), (256, 170), (170, 256), (320, 240))
SUFFIXES = ("jpg", "jpg", "jpg", "jpg", "jpg", "jpg", "jpg", "jpg", "png", "webp")
TYPES = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp", "gif": "image/gif", "avif": "image/avif"}


@dataclass(frozen=True)
class Row:
    name: str
    url: str | None
    caption: str | bytes | None
    outcome: frozenset[str] = KEPT
    error: str = ""
    pixels: tuple[int, int] | None = None


# Pictures


def draw(number: int, size: tuple[int, int] | None = None) -> Image.Image:
    """Returns an RGB picture that its number decides: polygons on a soft ground."""
    rng = np.random.default_rng([77, number])
    width, height = size or SIZES[number % len(SIZES)]
    ground = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    pen = ImageDraw.Draw(ground)
    for corners in (3, 4, 5):
        points = (rng.random((corners, 2)) * (width, height)).round().astype(int).tolist()
        pen.polygon([tuple(point) for point in points], fill=COLOURS[int(rng.integers(len(COLOURS)))])
    return ground


def encoded(image: Image.Image, suffix: str, **options: object) -> bytes:
    stream = io.BytesIO()
    settings: dict[str, dict[str, object]] = {"webp": {"method": 0}, "png": {"compress_level": 1}}
    image.save(stream, {"jpg": "jpeg"}.get(suffix, suffix), **(settings.get(suffix, {}) | options))
    return stream.getvalue()


def suffix_of(number: int) -> str:
    return SUFFIXES[number % len(SUFFIXES)]


def picture(number: int) -> bytes:
    """Returns a picture's file: JPEG, or for every fifth or so PNG or WebP."""
    return encoded(draw(number), suffix_of(number))


def caption_of(number: int) -> str:
    return f"picture {number} of {COLOURS[number % 8]} and {COLOURS[number // 8 % 8]} corners"


def bomb(side: int = 30_000) -> bytes:
    """Returns a whole black PNG of side x side pixels in about 0.1 MB."""
    line = bytes(1 + (side + 7) // 8)
    rows = next(rows for rows in range(1000, 0, -1) if side % rows == 0)
    packer = zlib.compressobj(9)
    # After a full flush a block stands alone, so that one is all.
    head = packer.compress(b"") + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(line * rows) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = functools.reduce(lambda sum, _: zlib.adler32(line * rows, sum), range(side // rows), 1)
    scan = head + block * (side // rows) + b"\x01\x00\x00\xff\xff" + struct.pack(">I", checksum)
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", scan) + chunk(b"IEND", b"")


def rotted(jpeg: bytes) -> bytes:
    """Returns a JPEG of the same length whose scan is noise from its middle on; it begins and ends as it should."""
    noise = np.random.default_rng(5).integers(1, 255, len(jpeg) // 3, np.uint8).tobytes()
    middle = len(jpeg) // 2
    return jpeg[:middle] + noise + jpeg[middle + len(noise) :]


def deep_png() -> bytes:
    ramp = np.add.outer(np.linspace(0, 20_000, 160), np.linspace(0, 40_000, 200)).astype(np.uint16)
    return encoded(Image.fromarray(ramp), "png")


def animation(suffix: str) -> bytes:
    frames = [draw(9000 + i, (200, 160)) for i in range(3)]
    return encoded(frames[0], suffix, save_all=True, append_images=frames[1:], duration=100)


def sideways() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    return encoded(draw(9010, (240, 160)), "jpg", exif=exif)


# Answers: bytes that are sent at once, or a coroutine that makes trouble on the connection

Answer = bytes | Callable[["Connection"], Awaitable[None]]


def answer(
    body: bytes, kind: str = "image/jpeg", status: str = "200 OK", length: int | None = None, *more: str
) -> bytes:
    lines = (
        f"HTTP/1.1 {status}",
        f"Content-Type: {kind}",
        f"Content-Length: {len(body) if length is None else length}",
    )
    return "\r\n".join((*lines, *more, "Connection: close", "", "")).encode() + body


def redirect(to: str) -> bytes:
    return answer(b"", "text/plain", "302 Found", None, f"Location: {to}")


def drip(content: bytes, wait_s: float, whole: bytes = b"") -> Callable[["Connection"], Awaitable[None]]:
    """`whole` at once, then the content byte by byte."""

    async def run(connection: "Connection") -> None:
        await connection.send(whole)
        for i in range(len(content)):
            await connection.send(content[i : i + 1])
            await asyncio.sleep(wait_s)

    return run


def endless(head: str) -> Callable[["Connection"], Awaitable[None]]:
    async def run(connection: "Connection") -> None:
        chunked = "chunked" in head
        piece = b"\xff\xd8\xff" + bytes(65_533)
        await connection.send(f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n{head}\r\n".encode())
        while True:
            await connection.send(b"10000\r\n" + piece + b"\r\n" if chunked else piece)

    return run


def broken_off(content: bytes) -> Callable[["Connection"], Awaitable[None]]:
    """Half the content, then a reset."""

    async def run(connection: "Connection") -> None:
        await connection.send(content[: len(content) // 2])
        await asyncio.sleep(0.05)
        connection.reset()

    return run


def fails_first(content: bytes) -> Callable[["Connection"], Awaitable[None]]:
    async def run(connection: "Connection") -> None:
        seen = connection.web.seen
        seen[connection.path] = seen.get(connection.path, 0) + 1
        first = seen[connection.path] == 1
        await connection.send(answer(b"busy", "text/plain", "503 Service Unavailable") if first else content)

    return run


async def silent(connection: "Connection") -> None:
    await asyncio.sleep(3600)


def chunked(body: bytes) -> bytes:
    pieces = [body[i : i + 1000] for i in range(0, len(body), 1000)]
    lines = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: chunked\r\n\r\n" + lines + b"0\r\n\r\n"


@dataclass(frozen=True)
class Trouble:
    answer: Answer
    outcome: frozenset[str]
    error: str = ""
    pixels: tuple[int, int] | None = None


def states(*names: str) -> frozenset[str]:
    return frozenset(names)


RESET = r"reset|IncompleteRead"
PRIVATE = "HTTP Error 403: private address"


@functools.cache
def troubles() -> dict[str, Trouble]:
    """Returns what makes trouble by being asked for, under the path /trouble/NAME."""
    jpeg, size = encoded(draw(9001, (240, 180)), "jpg"), (240, 180)
    ok = answer(jpeg)
    page = b"<!doctype html><html><body><h1>This image was removed</h1></body></html>"
    drawing = (
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="200" height="200">'
        b'<rect width="99" height="99"/></svg>'
    )
    grey, cmyk = encoded(draw(9002, size).convert("L"), "jpg"), encoded(draw(9003, size).convert("CMYK"), "jpg")
    clear = draw(9004, size)
    clear.putalpha(Image.linear_gradient("L").resize(size))
    status, cut, slow = states("status"), states("cut off"), states("too slow")
    no_image, damaged, opt_out = states("not an image"), states("damaged"), states("opt-out")
    private, big = states("private address"), states("too large")
    either = KEPT | {"mode"}

    def robots(value: str) -> bytes:
        return answer(jpeg, "image/jpeg", "200 OK", None, f"X-Robots-Tag: {value}")

    return {
        "404": Trouble(answer(page, "text/html", "404 Not Found"), status, "HTTP Error 404"),
        "410": Trouble(answer(page, "text/html", "410 Gone"), status, "HTTP Error 410"),
        "403-with-a-picture": Trouble(answer(jpeg, status="403 Forbidden"), status, "HTTP Error 403: Forbidden"),
        "429": Trouble(
            answer(b"", "text/plain", "429 Too Many Requests", None, "Retry-After: 1"), status, "HTTP Error 429"
        ),
        "503-once": Trouble(fails_first(ok), KEPT, "HTTP Error 503", size),
        "204": Trouble(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", states("empty", "status")),
        "empty": Trouble(answer(b""), states("empty")),
        "drip": Trouble(drip(jpeg, 0.2, ok[: -len(jpeg)]), slow, RESET),
        "drip-of-header": Trouble(drip(ok, 0.2), slow, "HTTP Error 504: too slow"),
        "silent": Trouble(silent, slow, "HTTP Error 504: too slow"),
        "reset": Trouble(broken_off(ok), cut, RESET),
        "reset-without-length": Trouble(broken_off(b"HTTP/1.1 200 OK\r\n\r\n" + jpeg), cut, RESET),
        "closed": Trouble(b"", cut, "HTTP Error 502: no answer"),
        "no-http": Trouble(b"220 mail.example ESMTP\r\n\r\n", states("cut off", "status"), "HTTP Error 502: no HTTP"),
        "long-header": Trouble(
            answer(jpeg, "image/jpeg", "200 OK", None, "X-Filler: " + "x" * (1 << 20)),
            states("too large"),
            "HTTP Error 502: header too large",
        ),
        "redirect": Trouble(redirect("/trouble/plain"), KEPT, "", size),
        "redirect-twice": Trouble(redirect("/trouble/redirect"), KEPT, "", size),
        "redirect-loop": Trouble(redirect("/trouble/redirect-back"), states("redirect"), "infinite loop"),
        "redirect-back": Trouble(redirect("/trouble/redirect-loop"), states("redirect"), "infinite loop"),
        "redirect-to-private": Trouble(redirect("http://10.0.0.1/secret.jpg"), private, PRIVATE),
        "redirect-to-metadata": Trouble(redirect("http://169.254.169.254/latest/meta-data/"), private, PRIVATE),
        "redirect-to-mapped": Trouble(redirect("http://[::ffff:192.168.0.1]/a.jpg"), private, PRIVATE),
        "redirect-to-file": Trouble(
            redirect("file:///etc/passwd"), states("redirect", "scheme", "private address"), "not allowed"
        ),
        "redirect-to-ftp": Trouble(
            redirect("ftp://192.0.2.1/a.jpg"), states("redirect", "scheme"), "HTTP Error 403: scheme not allowed"
        ),
        "length-too-long": Trouble(answer(jpeg, length=len(jpeg) + 500), cut, "IncompleteRead"),
        "length-too-short": Trouble(answer(jpeg, length=len(jpeg) // 2), damaged),
        "length-of-10-gb": Trouble(answer(jpeg, length=10**10), big, "HTTP Error 413: too large"),
        "length-is-no-number": Trouble(
            answer(jpeg, length=-5), states("cut off", "status"), "HTTP Error 502: bad length"
        ),
        "endless": Trouble(endless(""), big | slow, RESET),
        "endless-chunks": Trouble(endless("Transfer-Encoding: chunked\r\n"), big | slow, RESET),
        "html-as-jpeg": Trouble(answer(page), no_image),
        "html": Trouble(answer(page, "text/html"), no_image),
        "svg": Trouble(answer(drawing, "image/svg+xml"), no_image),
        "noise": Trouble(answer(np.random.default_rng(3).bytes(5000)), no_image),
        "truncated": Trouble(answer(jpeg[: len(jpeg) * 2 // 3]), damaged),
        "header-only": Trouble(answer(jpeg[:400]), damaged | no_image),
        "bit-rot": Trouble(answer(rotted(jpeg)), damaged),
        "png-truncated": Trouble(answer(encoded(draw(9005), "png")[:-2000], "image/png"), damaged),
        "bomb": Trouble(answer(bomb(), "image/png"), states("too many pixels")),
        "1x1": Trouble(answer(encoded(draw(1, (1, 1)), "png"), "image/png"), states("too small")),
        "1x20000": Trouble(answer(encoded(draw(2, (1, 20_000)), "png"), "image/png"), states("too small", "too long")),
        "3000x60": Trouble(answer(encoded(draw(3, (3000, 60)), "jpg")), states("too small", "too long", "kept")),
        "16-bit": Trouble(answer(deep_png(), "image/png"), either, "", (200, 160)),
        "cmyk": Trouble(answer(cmyk), either, "", size),
        "grey": Trouble(answer(grey), KEPT, "", size),
        "rgba": Trouble(answer(encoded(clear, "png"), "image/png"), either, "", size),
        "palette": Trouble(answer(encoded(draw(9006, size).quantize(16), "png"), "image/png"), either, "", size),
        "gif-animated": Trouble(answer(animation("gif"), "image/gif"), KEPT | {"animated"}, "", (200, 160)),
        "webp-animated": Trouble(answer(animation("webp"), "image/webp"), KEPT | {"animated"}, "", (200, 160)),
        "avif": Trouble(answer(encoded(draw(9007, size), "avif"), "image/avif"), KEPT | no_image, "", size),
        "progressive": Trouble(answer(encoded(draw(9008, size), "jpg", progressive=True)), KEPT, "", size),
        "sideways": Trouble(answer(sideways()), KEPT, "", (160, 240)),
        "jpeg-as-text": Trouble(answer(jpeg, "text/plain"), KEPT, "", size),
        "noai": Trouble(robots("noai"), opt_out),
        "noindex": Trouble(robots("noindex, nofollow"), opt_out),
        "noimageai-for-another": Trouble(robots("otherbot: noimageai"), KEPT | opt_out, "", size),
        "gzip": Trouble(
            answer(gzip.compress(jpeg), "image/jpeg", "200 OK", None, "Content-Encoding: gzip"),
            KEPT | no_image,
            "",
            size,
        ),
        "chunked": Trouble(chunked(jpeg), KEPT, "", size),
        "chunks-cut": Trouble(chunked(jpeg)[:-300], cut, "IncompleteRead"),
        "no-length": Trouble(b"HTTP/1.0 200 OK\r\nContent-Type: image/jpeg\r\n\r\n" + jpeg, KEPT, "", size),
        "plain": Trouble(ok, KEPT, "", size),
    }  # fmt: skip


def trouble_rows(url: str) -> list[Row]:
    """Returns a row for each kind of trouble: of the server at `url`, of addresses, and of captions."""
    rows = [
        Row(name, f"{url}/trouble/{name}", f"trouble {name}", trouble.outcome, trouble.error, trouble.pixels)
        for name, trouble in troubles().items()
    ]
    private, scheme, bad = states("private address"), states("scheme"), states("bad url")
    rows += [
        Row("private-10", "http://10.1.2.3/a.jpg", "a private address", private, PRIVATE),
        Row("private-192", "http://192.168.1.1/a.jpg", "a router", private, PRIVATE),
        Row("private-6", "http://[fd00::1]/a.jpg", "a private address of IPv6", private, PRIVATE),
        Row("link-local", "http://169.254.169.254/latest/meta-data/", "a cloud's metadata", private, PRIVATE),
        Row("carrier", "http://100.64.0.1/a.jpg", "a carrier's own address", private, PRIVATE),
        Row("zero", "http://0.0.0.0/a.jpg", "no address", private, PRIVATE),
        Row("number", "http://167837955/a.jpg", "10.1.0.3 as one number", private, PRIVATE),
        Row("tls-private", "https://10.1.2.3/a.jpg", "a private address by TLS", private, "403 private address"),
        Row("port-25", f"{url.rpartition(':')[0]}:25/a.jpg", "a mail server",
            states("private address", "port", "status"), "HTTP Error 403: port not allowed"),
        Row("file", "file:///etc/passwd", "a file", scheme | private),
        Row("ftp", "ftp://192.0.2.1/a.jpg", "ftp", scheme, "HTTP Error 403: scheme not allowed"),
        Row("data", "data:image/gif;base64,R0lGODlhAQABAAAAACw=", "a picture in its URL", scheme | bad),
        Row("gopher", "gopher://192.0.2.1/a.jpg", "gopher", scheme | bad, "unknown url type"),
        Row("no-scheme", "example.com/a.jpg", "no scheme", scheme | bad, "unknown url type"),
        # Where no name server answers, that takes some time to show.
        Row("nobody-there", "http://nobody.invalid/a.jpg", "a name that is none", bad | states("status", "too slow"),
            "HTTP Error (502: name not found|504: too slow)"),
        Row("nobody-listens", "http://127.0.0.1:1039/a.jpg", "no server",
            states("status", "cut off", "private address"), "HTTP Error 502: cannot connect"),
        Row("space-in-url", f"{url}/trouble/a picture.jpg", "a space in its URL", bad | states("status"),
            "URL can't contain"),
        Row("umlaut-in-url", f"{url}/trouble/größe.jpg", "an umlaut in its URL", bad | states("status"), "ascii"),
        Row("empty-url", "", "no URL", bad, "unknown url type"),
        Row("null-url", None, "a null for a URL", bad, "unknown url type"),
        Row("null-caption", f"{url}/pictures/c0.jpg", None, states("caption")),
        Row("empty-caption", f"{url}/pictures/c1.jpg", "", states("caption")),
        Row("blank-caption", f"{url}/pictures/c2.jpg", " \t\n", states("caption")),
        Row("latin-1-caption", f"{url}/pictures/c3.jpg", "Größe in Latin-1".encode("latin-1"), KEPT | {"caption"}),
        Row("nul-in-caption", f"{url}/pictures/c4.jpg", "a\0b", KEPT | {"caption"}),
        Row("long-caption", f"{url}/pictures/c5.jpg", "long " * 200_000, KEPT | {"caption"}),
        Row("emoji-caption", f"{url}/pictures/c6.jpg", "שלום \U0001f469\u200d\U0001f52c 你好"),
        Row("lines-in-caption", f"{url}/pictures/c7.jpg", "two\nlines\tand a tab"),
    ]  # fmt: skip
    # The same pair again, and the same picture under another caption.
    first, second = f"{url}/pictures/c6.jpg", f"{url}/pictures/c7.jpg"
    rows.append(Row("duplicate", first, rows[-2].caption, KEPT | {"duplicate"}))
    rows.append(Row("duplicate-url", second, "another caption", KEPT | {"duplicate"}))
    return rows


def picture_rows(url: str, num: int) -> list[Row]:
    return [
        Row(f"picture-{i}", f"{url}/pictures/{i}.{suffix_of(i)}", caption_of(i), pixels=SIZES[i % len(SIZES)])
        for i in range(num)
    ]


def write_metadata(
    path: Path, rows: Iterable[Row], url: str = "url", caption: str = "caption", rows_per_group: int = 1000
) -> None:
    """Writes the rows as a parquet file: two string columns as named, and `name`.

    A caption of bytes goes into the string column as it is, as careless writers do: Arrow does not look, readers that
    decode fail.
    """
    rows = list(rows)
    captions = [row.caption.encode() if isinstance(row.caption, str) else row.caption for row in rows]
    table = pa.table(
        {
            url: pa.array([row.url for row in rows], pa.string()),
            caption: pa.array(captions, pa.binary()).cast(pa.string(), safe=False),
            "name": pa.array([row.name for row in rows], pa.string()),
        }
    )
    pq.write_table(table, path, row_group_size=rows_per_group)


# The server


class Connection(asyncio.Protocol):
    """One request, one answer."""

    transport: asyncio.Transport

    def __init__(self, web: "Web") -> None:
        self.web = web
        self.path = ""
        self.request = b""
        self._task: asyncio.Task[None] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.web.open.add(self)

    def data_received(self, data: bytes) -> None:
        self.request += data
        if self.path or b"\r\n\r\n" not in self.request:
            return
        line = self.request.partition(b"\r\n")[0].decode("latin-1")
        self.path = line.split(" ")[1].partition("?")[0]
        self.web.requests.append(self.path)
        found = self.web.answers.get(self.path, MISSING)
        if isinstance(found, bytes):
            self.transport.write(found)
            self.transport.close()
        else:
            self._task = asyncio.create_task(self._run(found))

    async def _run(self, trouble: Callable[["Connection"], Awaitable[None]]) -> None:
        with contextlib.suppress(ConnectionError):
            await trouble(self)
        self.transport.close()

    async def send(self, data: bytes) -> None:
        if self.transport.is_closing():
            raise ConnectionResetError
        self.transport.write(data)
        await self._may_write.wait()

    def reset(self) -> None:
        socket = self.transport.get_extra_info("socket")
        socket.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER
        self.transport.abort()

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.web.open.discard(self)
        self._may_write.set()
        if self._task is not None:
            self._task.cancel()


MISSING = answer(b"", "text/plain", "404 Not Found")


@dataclass
class Web:
    """A server's answers, and what it was asked."""

    num_pictures: int
    answers: dict[str, Answer] = field(default_factory=dict[str, Answer])
    requests: list[str] = field(default_factory=list[str])
    seen: dict[str, int] = field(default_factory=dict[str, int])
    open: set[Connection] = field(default_factory=set[Connection])
    url: str = ""

    def __post_init__(self) -> None:
        for i in range(self.num_pictures):
            self.answers[f"/pictures/{i}.{suffix_of(i)}"] = answer(picture(i), TYPES[suffix_of(i)])
        for i in range(8):
            self.answers[f"/pictures/c{i}.jpg"] = answer(encoded(draw(8000 + i), "jpg"))
        for name, trouble in troubles().items():
            self.answers[f"/trouble/{name}"] = trouble.answer

    def rows(self) -> list[Row]:
        """Returns a row for each picture and each trouble."""
        return picture_rows(self.url, self.num_pictures) + trouble_rows(self.url)

    def reset(self) -> None:
        self.seen.clear()
        self.requests.clear()

    async def listen(self, port: int = 0) -> asyncio.Server:
        loop = asyncio.get_running_loop()
        server = await loop.create_server(lambda: Connection(self), "127.0.0.1", port, backlog=2048)
        self.url = "http://{}:{}".format(*server.sockets[0].getsockname())
        return server


@contextlib.contextmanager
def serving(pictures: int = 0, port: int = 0) -> Generator[Web]:
    """Gives a server that runs in a thread of this process."""
    web, ready = Web(pictures), threading.Event()
    loop, stop = asyncio.new_event_loop(), asyncio.Event()

    async def main() -> None:
        server = await web.listen(port)
        ready.set()
        await stop.wait()
        server.close()
        # What were left open would fail whichever test runs when the garbage collector finds it.
        while web.open:
            for connection in web.open:
                connection.transport.abort()
            await asyncio.sleep(0)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def run() -> None:
        loop.run_until_complete(main())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield web
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)


def main() -> None:
    parser = argparse.ArgumentParser(description="pictures and troubles on loopback", allow_abbrev=False)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=3000)
    parser.add_argument("--metadata", type=Path, help="write the rows to this parquet file")
    arguments = parser.parse_args()
    with serving(arguments.pictures, arguments.port) as web:
        if arguments.metadata:
            write_metadata(arguments.metadata, web.rows())
        print(f"listening on {web.url}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
