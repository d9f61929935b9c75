"""What the index refuses of JPEGs whose header libjpeg accepts, and that no decoder stops at what it lets through."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipeline.jpeg import DAMAGED, MAX_SCANS, MAX_SEGMENTS, damage, fatal_error, frame_size, is_warning, without_scans

Damage = Callable[[bytes], bytes]


def segments(jpeg: bytes) -> list[tuple[int, int, int]]:
    """The (marker, start, end) of each segment up to the first scan."""
    found: list[tuple[int, int, int]] = []
    at = 2
    while not found or found[-1][0] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")
        found.append((jpeg[at + 1], at, end))
        at = end
    return found


def first(jpeg: bytes, marker: int) -> tuple[int, int]:
    return next((start, end) for each, start, end in segments(jpeg) if each == marker)


def without(marker: int) -> Damage:
    def drop(jpeg: bytes) -> bytes:
        start, end = first(jpeg, marker)
        return jpeg[:start] + jpeg[end:]

    return drop


def inserted(content: bytes, marker: int | None = None, at: float = 0) -> Damage:
    """Puts `content` before a segment, or so far into the scan: 0 at its start, 1 at the end mark."""

    def insert(jpeg: bytes) -> bytes:
        scan = segments(jpeg)[-1][2]
        place = scan + round(at * (len(jpeg) - 2 - scan)) if marker is None else first(jpeg, marker)[0]
        return jpeg[:place] + content + jpeg[place:]

    return insert


def changed(marker: int, offset: int, value: int) -> Damage:
    def change(jpeg: bytes) -> bytes:
        place = first(jpeg, marker)[0] + offset
        return jpeg[:place] + bytes([value]) + jpeg[place + 1 :]

    return change


def noise(jpeg: bytes) -> bytes:
    scan = segments(jpeg)[-1][2]
    return jpeg[:scan] + np.random.default_rng(0).bytes(8000).replace(b"\xff\xd9", b"\xff\xd8") + b"\xff\xd9"


COMMENT = b"\xff\xfe\x00\x06abcd"
STOPS: dict[str, Damage] = {
    "no quantisation table": without(0xDB),
    "table that is not there": changed(0xC0, 12, 3),
    "scan's table that is not there": changed(0xDA, 6, 0x33),
    "scan of no such component": changed(0xDA, 5, 9),
    "impossible Huffman table": changed(0xC4, 5, 255),
    "12 bits": changed(0xC0, 4, 12),
    "bytes between segments": inserted(b"abc", 0xC0),
    "a restart between segments": inserted(b"\xff\xd3", 0xC0),
    "a second frame in the scan": inserted(b"\xff\xc0\x00\x0b", at=0.5),
    "a marker of nothing in the scan": inserted(b"\xff\xb1", at=0.5),
    "a comment in the scan": inserted(COMMENT, at=0.5),
    "noise for a scan": noise,
    "segment longer than the file": changed(0xDB, 2, 255),
    "no end": lambda jpeg: jpeg[:-2],
    "more segments than there can be": inserted(COMMENT * MAX_SEGMENTS, 0xC0),
    "nothing but fill bytes": lambda jpeg: jpeg[:2] + b"\xff" * 1_000_000,
}


@pytest.mark.parametrize("kind", STOPS)
def test_what_stops_a_decoder_is_refused(photo_jpegs: list[bytes], kind: str) -> None:
    for jpeg in photo_jpegs[:6]:
        assert damage(STOPS[kind](jpeg)) == DAMAGED
        assert damage(memoryview(STOPS[kind](jpeg))) == DAMAGED
        assert frame_size(jpeg) is not None
        assert frame_size(STOPS[kind](jpeg)) is None


def formats(pixels: np.ndarray) -> dict[str, bytes]:
    """One picture as the encoders of the world write it."""
    import cv2

    def saved(**settings: object) -> bytes:
        stream = io.BytesIO()
        settings.setdefault("quality", 90)
        Image.fromarray(pixels).convert(str(settings.pop("mode", "RGB"))).save(stream, "JPEG", **settings)
        return stream.getvalue()

    restarts = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_RST_INTERVAL, 2])[1].tobytes()
    tags = {"exif": b"Exif\0\0" + bytes(9000), "icc_profile": bytes(150_000), "comment": b"\xff\xda" * 50}
    return {
        "baseline": saved(),
        "optimised": saved(optimize=True),
        "progressive": saved(progressive=True),
        "progressive, restarts": saved(progressive=True, restart_marker_rows=1),
        "grey": saved(mode="L"),
        "grey, progressive": saved(mode="L", progressive=True),
        "4:4:4": saved(subsampling=0),
        "RGB": saved(keep_rgb=True),
        "restarts": restarts,
        "tags": saved(**tags),
        "coarsest": saved(quality=1),
        "finest": saved(quality=100),
    }


LETS_PASS: dict[str, Damage] = {
    "as it is": lambda jpeg: jpeg,
    "fill bytes": inserted(b"\xff\xff", 0xDB),
    "a comment before the end": inserted(COMMENT, at=1),
    "number of lines before the end": inserted(b"\xff\xdc\x00\x04\x00\x80", at=1),
    "a trailer": lambda jpeg: jpeg + bytes(20) + jpeg[:500] + b"\xff\xd9",
}


@pytest.mark.parametrize("kind", LETS_PASS)
def test_what_every_decoder_reads_passes(photographs: list[np.ndarray], kind: str) -> None:
    for picture in photographs[:3]:
        for size in ((200, 150), (37, 61)):
            pixels = np.asarray(Image.fromarray(picture).resize(size))
            for name, jpeg in formats(pixels).items():
                assert damage(LETS_PASS[kind](jpeg)) is None, f"{name}, {size}"
                for _ in range(2):  # the second time from what is remembered of the first
                    assert frame_size(LETS_PASS[kind](jpeg)) == size[::-1], f"{name}, {size}"


def test_scans_are_counted(photo_jpegs: list[bytes]) -> None:
    """Of a progressive picture, which may repeat one for ever."""
    stream = io.BytesIO()
    Image.open(io.BytesIO(photo_jpegs[0])).save(stream, "JPEG", progressive=True)
    jpeg = stream.getvalue()
    starts = [at for at in range(len(jpeg)) if jpeg[at : at + 2] == b"\xff\xda"]
    last = jpeg[starts[-1] : -2]
    spare = MAX_SCANS - len(starts)
    assert spare > 50
    assert damage(jpeg[:-2] + last * spare + jpeg[-2:]) is None
    assert damage(jpeg[:-2] + last * (spare + 1) + jpeg[-2:]) == DAMAGED


def test_wrong_bits_and_a_scan_that_ends_too_soon_pass(photo_jpegs: list[bytes]) -> None:
    """Both decoders read on past them; see the README on what is trained on."""
    for jpeg in photo_jpegs[:6]:
        scan = segments(jpeg)[-1][2]
        half = (scan + len(jpeg)) // 2
        assert damage(jpeg[:half] + bytes(len(jpeg) - half - 2) + b"\xff\xd9") is None
        assert damage(jpeg[:half].rstrip(b"\xff") + b"\xff\xd9") is None


def test_the_skeleton_is_a_small_picture_of_the_same_kind(photo_jpegs: list[bytes]) -> None:
    for jpeg in photo_jpegs[:6]:
        found = without_scans(jpeg)
        assert found is not None
        skeleton, size = found
        assert size == simplejpeg.decode_jpeg_header(jpeg)[:2]
        assert len(skeleton) < 1000
        assert simplejpeg.decode_jpeg_header(skeleton)[:3] == (8, 8, "YCbCr")


def test_an_error_after_a_warning_is_found(photo_jpegs: list[bytes]) -> None:
    """simplejpeg, not strict, lets it pass, and what it returns was never written."""
    start, end = first(photo_jpegs[0], 0xDB)
    broken = photo_jpegs[0][:start] + b"abc" + photo_jpegs[0][end:]
    assert fatal_error(broken) is not None
    assert fatal_error(photo_jpegs[0]) is None
    scan = segments(photo_jpegs[0])[-1][2]
    short = photo_jpegs[0][: scan + 40].rstrip(b"\xff") + b"\xff\xd9"
    assert fatal_error(short) is None
    with pytest.raises(ValueError, match="premature end") as caught:
        simplejpeg.decode_jpeg(short, strict=True)
    assert is_warning(caught.value)


FUZZ = """
import sys
import numpy as np, simplejpeg
from pipeline.decode_dali import DaliDecoder
from pipeline.decode_turbo import TurboDecoder
from pipeline.scan import _inspect as inspect
from pipeline.tokens import token_geometry
jpegs = [open(name, "rb").read() for name in sys.argv[3:]]
rng = np.random.default_rng(int(sys.argv[1]))
geometry = token_geometry(1)
dali, turbo = DaliDecoder(geometry, 1), TurboDecoder(geometry)
built = [0]
build = dali._build
def counted():
    built[0] += 1
    return build()
dali._build = counted
passed = refused = 0
for turn in range(int(sys.argv[2])):
    jpeg = bytearray(jpegs[turn % len(jpegs)])
    scan = jpeg.index(b"\\xff\\xda") + 14
    first, last = (2, scan) if turn % 3 == 0 else (scan, len(jpeg) - 2)
    kind = int(rng.integers(4))
    at = int(rng.integers(first, last))
    if kind == 0:
        for place in rng.integers(first, last, 3): jpeg[place] = rng.integers(256)
    elif kind == 1: jpeg[at:at] = rng.bytes(int(rng.integers(1, 5)))
    elif kind == 2: del jpeg[at : min(last, at + int(rng.integers(1, 5)))]
    else: jpeg[at : min(last, at + 200)] = rng.bytes(min(last, at + 200) - at)
    height, width, fault = inspect(memoryview(bytes(jpeg)))
    if fault is not None or height * width > 1_000_000:
        refused += 1
        continue
    passed += 1
    left, top = rng.uniform(0, 0.5, 2) * (width, height)
    window = np.array([[left, top, (width - left) * 0.9, (height - top) * 0.9]])
    sides = np.array([width], np.int32), np.array([height], np.int32)
    faults = [each.decode([bytes(jpeg)], window, np.zeros((1, 1), np.int16), *sides).faults for each in (dali, turbo)]
    assert faults == [{}, {}], (turn, kind, faults)
assert built[0] == 0, built
assert passed > 100 and refused > 100, (passed, refused)
"""


def test_no_decoder_stops_at_what_the_index_lets_through(photographs: list[np.ndarray], tmp_path: Path) -> None:
    """In a process of its own: a parser's error may be a memory error."""
    names: list[str] = []
    for number, jpeg in enumerate(formats(np.asarray(Image.fromarray(photographs[0]).resize((150, 120)))).values()):
        if len(jpeg) < 20_000:
            (tmp_path / f"{number}.jpg").write_bytes(jpeg)
            names.append(str(tmp_path / f"{number}.jpg"))
    done = subprocess.run([sys.executable, "-c", FUZZ, "0", "900", *names], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
