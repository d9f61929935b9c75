"""A JPEG in, why no decoder should see it out: its marker segments judged by libjpeg, its pixels left alone.

What libjpeg accepts as a header may still ask for tables that are not there, and damage in a scan can look like more
segments. Both end DALI's graph; libjpeg notices the second only where it reads to the end, which a crop need not. So
each image is looked at when it is indexed, 20 us for 5 KB and 40 us for 70 KB, and again before DALI sees it.
"""

import functools
import re
import struct

import numpy as np
import simplejpeg

DAMAGED = "damaged JPEG segments"
MAX_SEGMENTS = 4096
"""Photographs have 10 to 300; each costs a microsecond here."""
MAX_SCANS = 100
"""Photographs have 1 to 20. Each costs a decoder a pass over the picture, 40 ms at 64 megapixels, and may be 100 bytes:
a file of 1 MB could hold a batch up for minutes."""

_END, _SCAN, _HUFFMAN, _ARITHMETIC = 0xD9, 0xDA, 0xC4, 0xCC
_FRAMES = frozenset(range(0xC0, 0xD0)) - {_HUFFMAN, 0xC8, _ARITHMETIC}
_PROGRESSIVE = frozenset((0xC2, 0xC6, 0xCA, 0xCE))
_TEXT = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))
"""Segments that change no pixel: APPn but for JFIF's and Adobe's, which tell the colours, and comments."""
_AFTER_SCANS = (_END, 0xDC, *range(0xE0, 0xF0), 0xFE)
_SEGMENT = re.compile(rb"\xff{1,16}[\x02-\xcf\xd9-\xfe]")
"""Restarts and a second start do not belong between segments: libjpeg skips some of it, DALI's parser gives up."""
_MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")
_TINY = (8).to_bytes(2, "big") * 2
_OPENING_BYTES = 4096
"""Of a photograph's tags and tables, without a thumbnail or a colour profile; longer ones are not remembered."""
_BASELINE, _START_OF_SCAN, _END_OF_IMAGE = b"\xff\xc0", b"\xff\xda", b"\xff\xd9"
_SIDES = struct.Struct(">HH")
_SOME_SIDES = _SIDES.pack(65501, 65503)
_VECTOR_BYTES = 4096
"""From so many bytes on NumPy finds a marker faster than `re`."""
_PREMATURE = "Corrupt JPEG data: premature end of data segment"
_WARNINGS = (
    "Corrupt JPEG data: ",
    "Inconsistent progression sequence",
    "Invalid SOS parameters for sequential",
    "Premature end of JPEG file",
    "Unknown Adobe color transform",
    "Warning: unknown JFIF revision",
)
"""How those warnings of libjpeg-turbo's begin (jerror.h, JWRN_) that a decoder can meet."""


def damage(jpeg: bytes | memoryview) -> str | None:
    """Returns why an image whose header libjpeg accepts must not be decoded, or None.

    Finds what makes a decoder stop (tables missing or impossible, scans with impossible parameters, markers where a
    scan should go on), not what it reads on past, such as wrong bits or a scan that ends too soon.
    """
    skeleton, _ = without_scans(jpeg) or (b"", None)
    return None if skeleton and fatal_error(skeleton) is None else DAMAGED


def frame_size(jpeg: bytes) -> tuple[int, int] | None:
    """Returns the (height, width) that an image's segments tell; None where `damage` finds some.

    Most images of a shard set begin alike but for their size, since one encoder wrote them: what was judged once is
    known again by its bytes, and only the scan is looked through: 5 us for 5 KB, 20 us for 70 KB.
    """
    sides, scan = jpeg.find(_BASELINE, 2, _OPENING_BYTES) + 5, jpeg.find(_START_OF_SCAN, 2, _OPENING_BYTES)
    start = scan + 2 + int.from_bytes(jpeg[scan + 2 : scan + 4])
    if 5 < sides < scan and _opens_one_scan(jpeg[:sides] + _SOME_SIDES + jpeg[sides + 4 : start]):
        end = _scan_end(jpeg, start)
        if jpeg[end : end + 2] == _END_OF_IMAGE:
            return _SIDES.unpack_from(jpeg, sides)
    skeleton, size = without_scans(jpeg) or (b"", (0, 0))
    return size if skeleton and fatal_error(skeleton) is None else None


@functools.lru_cache(maxsize=256)
def _opens_one_scan(opening: bytes) -> bool:
    """Whether these are all segments before a scan, libjpeg accepts them, and _SOME_SIDES is where the size stands."""
    skeleton, size = without_scans(opening + _END_OF_IMAGE) or (b"", (0, 0))
    return size == _SIDES.unpack(_SOME_SIDES) and fatal_error(skeleton) is None


def fatal_error(jpeg: bytes) -> str | None:
    """Returns the error at which libjpeg gives an image up, at the smallest scale; None where it reads to the end.

    Not by simplejpeg's `strict=False` alone: after a warning it lets errors pass too, and hands out unwritten memory.
    """
    try:
        # Positional, as in decode_turbo.py.
        simplejpeg.decode_jpeg(jpeg, "RGB", True, True, 1, 1, 1, None, True)
    except Exception as error:  # simplejpeg raises ValueError, and KeyError for what libjpeg does not know
        if not is_warning(error):
            return str(error)
        if str(error) != _PREMATURE:
            return _refusal(jpeg)
    return None


def _refusal(jpeg: bytes) -> str | None:
    """Why simplejpeg will not go on after a warning, which for some in the header it does not."""
    try:
        simplejpeg.decode_jpeg(jpeg, "RGB", True, True, 1, 1, 1, None, False)
    except ValueError as error:
        return str(error)
    return None


def is_warning(error: Exception) -> bool:
    """Whether what simplejpeg raises when strict is a warning of libjpeg's; of several messages it gives the last."""
    return isinstance(error, ValueError) and str(error).startswith(_WARNINGS)


def without_scans(jpeg: bytes | memoryview) -> tuple[bytes, tuple[int, int]] | None:
    """Returns an image of 8 x 8 pixels with the segments of `jpeg` and empty scans, and the (height, width) of `jpeg`.

    libjpeg judges the small image in 6 us.

    None where something else stands between segments, where they lead out of the file, where they go on after the last
    scan, or where they are too many.
    """
    pieces, size = [b"\xff\xd8"], (0, 0)
    at, missing, progressive, num_scans = 2, 0, False, 0
    for _ in range(MAX_SEGMENTS):
        if (found := _SEGMENT.match(jpeg, at)) is None:
            return None
        at = found.end()
        marker = jpeg[at - 1]
        if marker == _END:
            pieces.append(_END_OF_IMAGE)
            return b"".join(pieces), size
        end = at + int.from_bytes(jpeg[at : at + 2], "big")
        if end < at + 2 or end > len(jpeg):
            return None
        if marker not in _TEXT:
            segment = bytes(jpeg[at - 2 : end])
            if marker in _FRAMES and len(segment) > 9:
                progressive, missing = marker in _PROGRESSIVE, segment[9]
                size = int.from_bytes(segment[5:7]), int.from_bytes(segment[7:9])
                segment = segment[:5] + _TINY + segment[9:]
            pieces.append(segment)
            if marker == _SCAN:
                num_scans += 1
                if num_scans > MAX_SCANS:
                    return None
                end = _scan_end(jpeg, end)
                missing -= segment[4]
                if missing <= 0 and not progressive and (end == len(jpeg) or jpeg[end + 1] not in _AFTER_SCANS):
                    return None
        at = end
    return None


def _scan_end(jpeg: bytes | memoryview, start: int) -> int:
    """Where the first marker that is no restart stands, from `start` on; len(jpeg) for none."""
    if len(jpeg) - start >= _VECTOR_BYTES:
        scan = np.frombuffer(jpeg, np.uint8, offset=start)
        marks = scan[1:] != 0
        marks &= scan[:-1] == 0xFF
        start += int(marks.argmax())  # 0 for none; of restarts and stuffing, the first
    found = _MARKER.search(jpeg, start)
    return len(jpeg) if found is None else found.start()
