import io
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image, ImageOps
from trouble_server import KEPT, SIZES, bomb, picture, picture_rows, serving, trouble_rows, troubles, write_metadata

ROOT = Path(__file__).parents[1]


def body(name: str) -> bytes:
    answer = troubles()[name].answer
    assert isinstance(answer, bytes)
    return answer.partition(b"\r\n\r\n")[2]


def test_pictures_are_distinct_and_drawn_from_their_number() -> None:
    drawn = [picture(i) for i in range(120)]
    assert len(set(drawn)) == 120
    assert drawn[7:9] == [picture(7), picture(8)]
    for i, content in enumerate(drawn):
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            assert (image.size, image.mode) == (SIZES[i % len(SIZES)], "RGB")
            assert image.format == {8: "PNG", 9: "WEBP"}.get(i % 10, "JPEG")


@pytest.mark.parametrize(
    ("name", "format", "mode", "size"),
    [
        ("16-bit", "PNG", "I;16", (200, 160)),
        ("cmyk", "JPEG", "CMYK", (240, 180)),
        ("grey", "JPEG", "L", (240, 180)),
        ("rgba", "PNG", "RGBA", (240, 180)),
        ("palette", "PNG", "P", (240, 180)),
        ("gif-animated", "GIF", "", (200, 160)),
        ("webp-animated", "WEBP", "", (200, 160)),
        ("avif", "AVIF", "RGB", (240, 180)),
        ("sideways", "JPEG", "RGB", (240, 160)),
        ("progressive", "JPEG", "RGB", (240, 180)),
        ("1x1", "PNG", "RGB", (1, 1)),
        ("1x20000", "PNG", "RGB", (1, 20_000)),
    ],
)
def test_each_picture_has_the_trouble_that_its_name_says(
    name: str, format: str, mode: str, size: tuple[int, int]
) -> None:
    with Image.open(io.BytesIO(body(name))) as image:
        image.load()
        assert (image.format, image.size) == (format, size)
        assert image.mode == mode or not mode
        assert getattr(image, "n_frames", 1) == (3 if "animated" in name else 1)
        upright = ImageOps.exif_transpose(image).size
    if "kept" in troubles()[name].outcome:
        assert upright == troubles()[name].pixels


def test_what_is_damaged_is_damaged() -> None:
    for name in ("bit-rot", "truncated"):
        assert body(name).startswith(b"\xff\xd8")
        with pytest.raises(ValueError, match=r"Corrupt JPEG data|Premature end"):
            simplejpeg.decode_jpeg(body(name), strict=True)
    assert body("bit-rot").endswith(b"\xff\xd9")
    assert len(body("bit-rot")) == len(body("plain"))
    with Image.open(io.BytesIO(body("png-truncated"))) as image, pytest.raises(OSError, match=r"."):
        image.load()


def test_a_bomb_is_small_in_bytes_and_whole() -> None:
    assert len(bomb()) < 120_000
    assert bomb()[16:24] == (30_000).to_bytes(4, "big") * 2
    with Image.open(io.BytesIO(bomb(2000))) as image:
        assert image.size == (2000, 2000)
        assert image.convert("L").getextrema() == (0, 0)


def test_metadata_holds_every_row_with_its_caption_as_it_is(tmp_path: Path) -> None:
    rows = picture_rows("http://127.0.0.1:1", 30) + trouble_rows("http://127.0.0.1:1")
    assert len({row.name for row in rows}) == len(rows)
    assert len(troubles()) >= 25
    assert all(row.outcome for row in rows)
    assert {row.outcome for row in rows[:30]} == {KEPT}
    write_metadata(tmp_path / "m.parquet", rows, url="URL", caption="TEXT")
    table = pq.read_table(tmp_path / "m.parquet")
    assert [str(field.type) for field in table.schema] == ["string"] * 3
    assert table.column_names == ["URL", "TEXT", "name"]
    assert table["URL"].to_pylist() == [row.url for row in rows]
    expected = [row.caption.encode() if isinstance(row.caption, str) else row.caption for row in rows]
    assert table["TEXT"].cast("binary").to_pylist() == expected
    with pytest.raises(UnicodeDecodeError):
        table["TEXT"].to_pylist()


def test_what_fails_once_fails_once_until_it_is_reset() -> None:
    with serving() as web:
        seen: list[int] = []
        for turn in range(4):
            if turn == 2:
                web.reset()
            try:
                with urllib.request.urlopen(f"{web.url}/trouble/503-once", timeout=60) as response:
                    seen.append(response.status)
            except urllib.error.HTTPError as error:
                error.close()
                seen.append(error.code)
        assert seen == [503, 200, 503, 200]
        assert web.requests == ["/trouble/503-once"] * 2


def test_it_runs_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    command = [sys.executable, "tests/trouble_server.py", "--pictures", "20", "--metadata", str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        line = process.stdout.readline()
        assert re.fullmatch(r"listening on http://127\.0\.0\.1:\d+\n", line)
        urls = pq.read_table(path)["url"].to_pylist()
        assert urls[7].startswith(line.split()[-1])
        with urllib.request.urlopen(urls[7], timeout=60) as response:
            assert response.read() == picture(7)
        process.stdin.close()
        assert process.wait(60) == 0
