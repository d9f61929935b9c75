import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import simplejpeg
from conftest import Pixels, encode, eventually, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import ingest
from evaluation.classes import read_classes
from pipeline.decode import psnr
from pipeline.index import open_index
from pipeline.ingest.picture import Unusable, copy_picture
from pipeline.ingest.shards import Sample, Shard, write_shard
from pipeline.ingest.shrink import Options, describe, shrink

ROOT = Path(__file__).parents[1]
OPTIONS = Options(short_side=96, quality=90)


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def opened(image: bytes) -> Image.Image:
    return Image.open(io.BytesIO(image))


def decoded(image: bytes) -> npt.NDArray[np.uint8]:
    return np.asarray(opened(image).convert("RGB"))


def plain(image: bytes, size: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """The copy made the plain way: full decode, upright, bicubic."""
    upright = ImageOps.exif_transpose(opened(image).convert("RGB"))
    return np.asarray(upright.resize(size, Image.Resampling.BICUBIC))


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: stream.read() for member in tar if (stream := tar.extractfile(member)) is not None}


@pytest.fixture(scope="session")
def photo_shards(tmp_path_factory: pytest.TempPathFactory, photo_jpegs: Sequence[bytes]) -> Path:
    """240 photographs in 24 shards, with classes and what an index and img2dataset leave beside them. Only read."""
    folder = tmp_path_factory.mktemp("photos")
    for shard in range(24):
        write_tar(
            folder / f"{shard:05d}.tar",
            [
                {
                    "__key__": f"a/{shard:05d}{i:04d}",
                    "jpg": photo_jpegs[(shard * 10 + i) % 40],
                    "txt": f"café {i}\n".encode(),
                    "json": b'{"width": 1}',
                    "cls": b"%d" % (i % 2),
                    "other.txt": b"\xff\x00",
                }
                for i in range(10)
            ],
        )
        (folder / f"{shard:05d}_stats.json").write_text("{}")
    (folder / "classnames.txt").write_text("cat\ndog\n")
    (folder / "_index.parquet").write_bytes(b"not of the copy")
    return folder


@pytest.fixture(scope="session")
def photo_copies(tmp_path_factory: pytest.TempPathFactory, photo_shards: Path) -> Path:
    """Copies of photo_shards, made in this process. Only read."""
    out = tmp_path_factory.mktemp("copies") / "out"
    shrink(photo_shards, out, OPTIONS, workers=1)
    return out


# One image


@settings(max_examples=60)
@given(st.integers(8, 300), st.integers(8, 300), st.integers(8, 200), st.sampled_from(["JPEG", "PNG"]))
def test_the_short_side_is_exact_and_nothing_is_enlarged(width: int, height: int, short_side: int, kind: str) -> None:
    image = saved(Image.radial_gradient("L").resize((width, height)).convert("RGB"), kind)
    jpeg, copy = copy_picture(image, short_side, 90)
    assert (copy.original_width, copy.original_height) == (width, height)
    assert (copy.width, copy.height) == opened(jpeg).size
    if min(width, height) <= short_side:
        assert (copy.width, copy.height) == (width, height)
        assert (jpeg == image) == (kind == "JPEG") == (copy.change == "kept")
        return
    assert min(copy.width, copy.height) == short_side
    assert (copy.width < copy.height) <= (width < height)
    assert abs(copy.width / copy.height - width / height) <= 0.5 / short_side * max(width / height, 1) + 1e-9
    assert copy.change == ("shrunk" if kind == "JPEG" else "converted")


@pytest.mark.parametrize("short_side", [50, 96, 128, 300])
def test_copies_are_near_the_plain_way(photo_jpegs: Sequence[bytes], short_side: int) -> None:
    to_plain: list[float] = []
    loss: list[float] = []
    for image in photo_jpegs:
        jpeg, copy = copy_picture(image, short_side, 90)
        assert simplejpeg.decode_jpeg_header(jpeg)[2:] == ("YCbCr", "420")
        reference = plain(image, (copy.width, copy.height))
        to_plain.append(psnr(decoded(copy_picture(image, short_side, 100)[0]), decoded(encode(reference, 100))))
        loss.append(psnr(decoded(encode(reference, 90)), reference) - psnr(decoded(jpeg), reference))
    kept = sum(min(opened(image).size) <= short_side for image in photo_jpegs)
    assert kept < len(photo_jpegs)
    assert min(to_plain) > 38, f"the farthest copy is {min(to_plain):.1f} dB from the plain way"
    assert max(loss) < 0.4, f"a copy has lost {max(loss):.2f} dB more than the plain way at the same quality"


@pytest.mark.parametrize("size", [(300, 200), (64, 90)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_copies_are_upright(photographs: Sequence[Pixels], size: tuple[int, int], kind: str) -> None:
    picture = Image.fromarray(photographs[0]).resize(size, Image.Resampling.LANCZOS)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        exif[0x010F] = "a maker"
        image = saved(picture, kind, exif=exif, **({"quality": 95} if kind != "TIFF" else {}))
        jpeg, copy = copy_picture(image, 96, 95)
        upright = ImageOps.exif_transpose(opened(image))
        assert (copy.width > copy.height) == (upright.width > upright.height)
        # Pillow turns a TIFF before it tells the size.
        assert (copy.original_width, copy.original_height) == (upright.size if kind == "TIFF" else size)
        assert psnr(decoded(jpeg), plain(image, (copy.width, copy.height))) > 28, orientation
        if kind == "JPEG":
            assert copy.change == ("shrunk" if min(size) > 96 else "kept" if orientation == 1 else "turned")
        if copy.change != "kept":
            assert not opened(jpeg).getexif()
            assert b"a maker" not in jpeg


def test_an_image_with_damaged_metadata_stands_as_it_is_stored() -> None:
    jpeg = encode(np.full((60, 80, 3), 90, np.uint8))
    image = jpeg[:2] + b"\xff\xe1\x00\x10Exif\0\0" + b"\xff" * 8 + jpeg[2:]
    assert copy_picture(image, 96, 90)[0] == image


def test_other_images_become_jpeg(photographs: Sequence[Pixels]) -> None:
    picture = Image.fromarray(photographs[1]).resize((300, 200), Image.Resampling.LANCZOS)
    transparent = picture.convert("RGBA")
    transparent.paste((255, 0, 0, 0), (0, 0, 150, 200))
    on_white = picture.copy()
    on_white.paste((255, 255, 255), (0, 0, 150, 200))
    grey = np.asarray(picture.convert("L"))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    cases = {
        "png": (saved(picture, "PNG"), picture),
        "webp": (saved(picture, "WEBP", quality=95), picture),
        "bmp": (saved(picture, "BMP"), picture),
        "CMYK": (saved(picture.convert("CMYK"), "JPEG", quality=95), picture),
        "palette": (saved(picture.quantize(256), "PNG"), picture.quantize(256).convert("RGB")),
        "transparent": (saved(transparent, "PNG"), on_white),
        "transparent webp": (saved(transparent, "WEBP", lossless=True), on_white),
        "16 bits": (saved(deep, "PNG"), Image.fromarray(grey).convert("RGB")),
        "animated": (saved(picture, "WEBP", save_all=True, append_images=[deep.convert("RGB")], quality=95), picture),
    }
    for name, (image, expected) in cases.items():
        jpeg, copy = copy_picture(image, 96, 95)
        reference = np.asarray(expected.resize((144, 96), Image.Resampling.BICUBIC))
        assert (copy.change, copy.width, copy.height) == ("converted", 144, 96), name
        assert simplejpeg.decode_jpeg_header(jpeg)[2:] == ("YCbCr", "420")
        # A hard edge of colour, as at the border of the transparent half, is what 4:2:0 shows worst.
        assert psnr(decoded(jpeg), reference) > 27, name


def png_header(width: int, height: int) -> bytes:
    """A PNG of one grey tone that says it has this size, in 130 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(50))) + chunk(b"IEND", b"")


def jpeg_header(jpeg: bytes, width: int, height: int) -> bytes:
    """The same JPEG with another size in its header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def bad_images(jpeg: bytes) -> dict[str, tuple[bytes, str]]:
    """Name -> (image, reason)."""
    middle = len(jpeg) // 2
    png = saved(opened(jpeg), "PNG")
    return {
        "html": (b"<html>not found</html>", "not an image"),
        "empty": (b"", "empty image"),
        "cut": (jpeg[:middle], "damaged JPEG data"),
        "cut-but-ended": (jpeg[:middle] + b"\xff\xd9", "damaged JPEG data"),
        "zeros-inside": (jpeg[:middle] + bytes(2000) + jpeg[middle + 2000 :], "damaged JPEG data"),
        "header-only": (jpeg[:300], "damaged JPEG header"),
        "bomb": (jpeg_header(jpeg, 30_000, 30_000), "over 64 megapixels"),
        "png-bomb": (png_header(30_000, 30_000), "over 64 megapixels"),
        "png-smaller-bomb": (png_header(9_000, 9_000), "over 64 megapixels"),
        "png-cut": (png[: len(png) // 2], "damaged image data"),
        "png-strip": (png_header(70_000, 8), "over 65,500 pixels long"),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),
    }


def test_bad_images_are_told_apart(photo_jpegs: Sequence[bytes]) -> None:
    # Both where the image would be made smaller and where it would be kept.
    for short_side in (96, 1000):
        for name, (image, reason) in bad_images(photo_jpegs[2]).items():
            with pytest.raises(Unusable) as refused:
                copy_picture(image, short_side, 90)
            assert str(refused.value) == reason, name


# A shard set


def test_everything_but_the_image_is_kept(photo_shards: Path, photo_copies: Path) -> None:
    names = [f"{shard:05d}.{kind}" for shard in range(24) for kind in ("tar", "parquet")]
    assert sorted(tree(photo_copies)) == sorted([*names, "classnames.txt", "shrink.json"])
    for shard in photo_shards.glob("*.tar"):
        before, after = members(shard), members(photo_copies / shard.name)
        assert list(after) == list(before)
        rows = pq.read_table(photo_copies / f"{shard.stem}.parquet").to_pylist()
        assert [row["key"] for row in rows] == [f"a/{shard.stem}{i:04d}" for i in range(10)]
        sizes = [opened(before[f"{row['key']}.jpg"]).size for row in rows]
        copied = [opened(after[f"{row['key']}.jpg"]).size for row in rows]
        assert [(row["original_width"], row["original_height"]) for row in rows] == sizes
        assert [(row["width"], row["height"]) for row in rows] == copied
        assert {min(size) for size in copied} == {96}
        assert {row["status"] for row in rows} == {"success"}
        for name in before:
            assert name.endswith(".jpg") or after[name] == before[name]


def test_copies_can_be_trained_on(photo_copies: Path, tmp_path: Path) -> None:
    from test_loader import new_loader  # the one test here that needs torch

    folder = tmp_path / "copies"
    folder.mkdir()
    for name, content in tree(photo_copies).items():
        (folder / name).write_bytes(content)
    index = open_index([folder])
    assert (index.num_samples, index.num_usable, index.rejected) == (240, 240, {})
    assert {int(min(size)) for size in zip(index.rows(3).width, index.rows(3).height, strict=True)} == {96}
    batch = new_loader(folder).batch(0)
    assert batch.valid.all()
    assert batch.patches.float().std() > 10
    assert read_classes(folder)[0] == ["cat", "dog"]


def test_workers_change_nothing(photo_shards: Path, photo_copies: Path, tmp_path: Path) -> None:
    shrink(photo_shards, tmp_path / "out", OPTIONS, workers=3)
    assert tree(tmp_path / "out") == tree(photo_copies)


def test_columns_of_the_source_are_carried(photo_jpegs: Sequence[bytes], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()

    def draw(number: int) -> Sample:
        jpeg = photo_jpegs[number]
        width, height = opened(jpeg).size
        return Sample(jpeg, width, height, f"caption {number}", "npm:x", "MIT", "plain", class_id=number)

    write_shard(Shard(source, 0, range(6), draw))
    before = pq.read_table(source / "00000.parquet")
    # As img2dataset has them: rows of what was never downloaded, and a size of before its own resizing.
    failed = {"key": "000000009", "url": "http://x/y", "status": "failed_to_download", "error_message": "404"}
    listed = before.slice(0, 5).append_column("exif", pa.array(["{}"] * 5))
    listed = listed.set_column(8, "original_height", pa.array([5000] * 5, pa.int32()))
    listed = pa.concat_tables([listed, pa.Table.from_pylist([failed], listed.schema)])
    pq.write_table(listed, source / "00000.parquet")
    report = shrink(source, out, OPTIONS, workers=1)
    after = pq.read_table(out / "00000.parquet")
    assert after.column_names == listed.column_names
    rows, expected = after.to_pylist(), [*listed.to_pylist(), before.to_pylist()[5]]
    assert (report.samples, len(rows)) == (6, 7)
    for row, old in zip(rows[:5], expected[:5], strict=True):
        assert min(row["width"], row["height"]) == 96
        assert {**row, "width": old["width"], "height": old["height"]} == old
    assert rows[5] == expected[5]
    assert (rows[6]["key"], rows[6]["status"], rows[6]["url"]) == ("000000005", "success", None)
    assert rows[6]["original_width"] == expected[6]["width"]
    # Shrunk once more, the first size is still known.
    shrink(out, tmp_path / "again", Options(48, 90), workers=1)
    again = pq.read_table(tmp_path / "again" / "00000.parquet").to_pylist()
    assert [row["original_width"] for row in again] == [row["original_width"] for row in rows]
    assert [min(row["width"], row["height"]) for row in again if row["status"] == "success"] == [48] * 6


def test_bad_samples_are_left_out_counted_and_named(photo_jpegs: Sequence[bytes], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    bad = bad_images(photo_jpegs[2])
    good = {"jpg": photo_jpegs[0], "txt": b"good"}
    picture = saved(opened(photo_jpegs[1]), "PNG")
    samples = [{"__key__": name, "jpg": image, "txt": b"bad"} for name, (image, _) in bad.items()]
    samples += [{"__key__": "no-image", "txt": b"alone"}, {"__key__": "a-png", "png": picture, "txt": b"fine"}]
    write_tar(source / "00000.tar", [{"__key__": "first", **good}, *samples, {"__key__": "last", **good}])
    with tarfile.open(source / "00000.tar", "a") as tar:
        for name, content in {"twice.jpg": photo_jpegs[0], "twice.JPG": photo_jpegs[1], "README": b"?"}.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    report = shrink(source, out, OPTIONS, workers=1)
    expected = {name: reason for name, (_, reason) in bad.items()}
    expected |= {"no-image": "no image", "twice": "two members of the same name"}
    rows = {row["key"]: row for row in pq.read_table(out / "00000.parquet").to_pylist()}
    failed = {key: row["error_message"] for key, row in rows.items() if row["status"] == "failed_to_resize"}
    assert failed == expected
    assert sorted(rows) == sorted([*expected, "first", "a-png", "last"])
    assert list(members(out / "00000.tar")) == [
        "first.jpg",
        "first.txt",
        "a-png.jpg",
        "a-png.txt",
        "last.jpg",
        "last.txt",
    ]
    assert report.left_out == {reason: list(expected.values()).count(reason) for reason in expected.values()}
    assert report.changes == {"shrunk": 2, "converted": 1}
    assert json.loads((out / "shrink.json").read_text())["report"]["left_out"] == report.left_out
    text = describe(report, source, out)
    assert "3 samples (2 shrunk, 1 made JPEG)" in text
    assert "left out 14: 3 damaged JPEG data, 3 over 64 megapixels, 2 not an image" in text
    assert open_index([out]).num_usable == 3


def test_a_damaged_shard_is_copied_up_to_the_damage(photo_shards: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    whole = (photo_shards / "00000.tar").read_bytes()
    names = list(members(photo_shards / "00000.tar"))
    position = whole.index(b"a/000000006.jpg") + 512 + 99
    (source / "00000.tar").write_bytes(whole[:position])
    (source / "00001.tar").write_bytes(whole)
    (source / "00002.tar").write_bytes(b"")
    rows = [{"key": f"a/00000{i:04d}", "status": "success", "error_message": None} for i in range(10)]
    pq.write_table(pa.Table.from_pylist(rows), source / "00000.parquet")
    (source / "00001.parquet").write_bytes(b"PAR1 no more")
    report = shrink(source, out, OPTIONS, workers=1)
    kept = list(members(out / "00000.tar"))
    assert kept == names[: len(kept)]
    assert len(kept) in range(6 * 5, 7 * 5)
    assert list(members(out / "00001.tar")) == names
    assert members(out / "00002.tar") == {}
    assert report.problems == {
        "00000.tar": "cut off inside a/000000006.jpg",
        "00001.tar": "00001.parquet cannot be read, so its columns are not carried over",
        "00002.tar": "an empty file",
    }
    messages = [row["error_message"] for row in pq.read_table(out / "00000.parquet").to_pylist()]
    assert messages[-3:] == ["not in the shard: cut off inside a/000000006.jpg"] * 3
    assert f"{source / '00000.tar'}: cut off inside a/000000006.jpg" in describe(report, source, out)


def test_a_damaged_parquet_costs_its_columns_only(photo_jpegs: Sequence[bytes], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_tar(source / "00000.tar", [{"__key__": "0", "jpg": photo_jpegs[0], "txt": b"a cat"}])
    rows = [{"key": str(i), "caption": f"caption {i} " * 20, "status": "success"} for i in range(200)]
    pq.write_table(pa.Table.from_pylist(rows), source / "00000.parquet", compression="snappy")
    whole = (source / "00000.parquet").read_bytes()
    tar = (source / "00000.tar").read_bytes()
    metadata = pq.read_metadata(source / "00000.parquet").row_group(0)
    page = metadata.column(1).dictionary_page_offset

    # The footer is whole and the page is not: one that cannot be unpacked, and one whose text is not UTF-8.
    packed = whole[: page + 40] + b"\xff" * 60 + whole[page + 100 :]
    with pytest.raises(OSError, match="snappy"):
        pq.read_table(pa.BufferReader(packed))
    pq.write_table(pa.Table.from_pylist(rows), source / "00000.parquet", compression="none")
    text = (source / "00000.parquet").read_bytes().replace(b"caption 7 ", b"caption \xff ")
    for number, damaged in enumerate((packed, text)):
        (source / "00000.parquet").write_bytes(damaged)
        copies = out / str(number)
        report = shrink(source, copies, OPTIONS, workers=1)
        problem = "00000.parquet cannot be read, so its columns are not carried over"
        assert report.problems == {"00000.tar": problem}
        assert f"{source / '00000.tar'}: {problem}" in describe(report, source, copies)
        (row,) = pq.read_table(copies / "00000.parquet").to_pylist()
        assert (row["key"], row["status"]) == ("0", "success")
    assert (source / "00000.tar").read_bytes() == tar


def test_long_names_and_other_tar_dialects(photo_jpegs: Sequence[bytes], tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    names = ["x" * 150 + ".jpg", "x" * 150 + ".txt", "café/" * 60 + "y.jpeg", "z.JPG"]
    for shard, dialect in enumerate([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]):
        with tarfile.open(source / f"{shard}.tar", "w", format=dialect) as tar:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size = len(photo_jpegs[0])
                tar.addfile(member, io.BytesIO(photo_jpegs[0]))
    shrink(source, tmp_path / "out", OPTIONS, workers=1)
    assert list(members(tmp_path / "out" / "0.tar")) == names
    assert tree(tmp_path / "out")["0.tar"] == tree(tmp_path / "out")["1.tar"]


# Run again, refused, killed


def test_what_was_not_finished_is_made_again_and_the_rest_left_alone(
    photo_shards: Path, photo_copies: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, content in tree(photo_copies).items():
        (out / name).write_bytes(content)
    whole = tree(out)
    (out / "00003.tar.99.partial").write_bytes(b"cut")
    (out / "00004.parquet").unlink()
    (out / "00005.tar").unlink()
    (out / "00006.tar").write_bytes(b"cut short on another disk")
    pq.write_table(pa.table({"key": ["from elsewhere"]}), out / "00007.parquet")
    untouched = (out / "00000.tar").stat().st_mtime_ns
    report = shrink(photo_shards, out, OPTIONS, workers=1)
    assert tree(out) == whole
    assert (out / "00000.tar").stat().st_mtime_ns == untouched
    assert shrink(photo_shards, out, OPTIONS, workers=1) == report
    assert report.samples == 240
    assert report.bytes_before == sum(path.stat().st_size for path in photo_shards.glob("*.tar"))
    assert report.bytes_after == sum(path.stat().st_size for path in out.glob("*.tar"))


def test_a_source_that_grew_is_copied_anew(photo_jpegs: Sequence[bytes], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for count in (2, 30):
        write_tar(source / "00000.tar", [{"__key__": str(i), "jpg": photo_jpegs[i], "txt": b"x"} for i in range(count)])
        assert shrink(source, out, OPTIONS, workers=1).samples == count


def test_other_data_is_refused(photo_shards: Path, photo_copies: Path, tmp_path: Path) -> None:
    before = tree(photo_copies)
    with pytest.raises(ValueError, match="holds other copies: short_side is 96 there and 64 here; choose another"):
        shrink(photo_shards, photo_copies, Options(64, 90))
    with pytest.raises(ValueError, match="quality is 90 there and 80 here"):
        shrink(photo_shards, photo_copies, Options(96, 80))
    write_tar(tmp_path / "elsewhere" / "00000.tar", [])
    with pytest.raises(ValueError, match=f"source is {photo_shards} there and {tmp_path / 'elsewhere'} here"):
        shrink(tmp_path / "elsewhere", photo_copies, OPTIONS)
    assert tree(photo_copies) == before
    with pytest.raises(ValueError, match="is the source itself"):
        shrink(photo_shards, photo_shards / ".", OPTIONS)
    with pytest.raises(ValueError, match=r"elsewhere holds other files \(00000\.tar, \.\.\.\) and no shrink\.json"):
        shrink(photo_shards, tmp_path / "elsewhere", OPTIONS)
    with pytest.raises(ValueError, match="no such folder"):
        shrink(tmp_path / "nowhere", tmp_path / "out", OPTIONS)
    with pytest.raises(ValueError, match=r"no \.tar shards in it"):
        shrink(tmp_path, tmp_path / "out", OPTIONS)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--short-side 7 is under 8"):
        Options(7, 90)
    with pytest.raises(ValueError, match="--quality 101 is not between"):
        Options(128, 101)


def test_a_shard_that_the_source_lost_is_refused(photo_jpegs: Sequence[bytes], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    for shard in range(2):
        write_tar(source / f"{shard}.tar", [{"__key__": "x", "jpg": photo_jpegs[0]}])
    shrink(source, out, OPTIONS, workers=1)
    (source / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"out holds 1\.tar, which the source has not"):
        shrink(source, out, OPTIONS, workers=1)


def command(source: Path, out: Path, *more: str) -> list[str]:
    call = [sys.executable, str(ROOT / "ingest.py"), "shrink", str(source), "--out", str(out), "--short-side", "96"]
    return [*call, *more]


def end(call: Sequence[str], out: Path, how: signal.Signals) -> tuple[int, str]:
    """Runs a command until another shard is done, ends it, and returns its exit status and what it said."""
    before = len(list(out.glob("*.parquet")))
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        eventually(lambda: len(list(out.glob("*.parquet"))) != before)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)  # as a terminal does
        else:
            process.send_signal(how)
        errors = process.communicate()[1]
    return process.returncode, errors


def test_an_ended_command_continues_to_the_same_bytes(photo_jpegs: Sequence[bytes], tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    samples = [{"__key__": f"{i:04d}", "jpg": jpeg, "txt": b"x"} for i, jpeg in enumerate(photo_jpegs[:25])]
    for shard in range(24):
        write_tar(source / f"{shard:05d}.tar", samples)
    call = command(source, out, "--workers", "2")
    assert end(call, out, signal.SIGKILL)[0] == -signal.SIGKILL
    killed = len(list(out.glob("*.parquet")))
    status, errors = end(call, out, signal.SIGINT)
    assert status == 130
    assert errors.splitlines()[-1] == "interrupted; run the same command to continue"
    assert "Traceback" not in errors
    assert 1 <= killed < len(list(out.glob("*.parquet"))) < 24
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"{out}: 600 samples" in done.stdout
    assert "times smaller" in done.stdout.splitlines()[-1]
    shrink(source, tmp_path / "whole", OPTIONS, workers=1)
    assert tree(out) == tree(tmp_path / "whole")


# The command


def test_the_command_tells_in_one_line_what_to_do(
    photo_shards: Path, photo_copies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [
        (command(photo_shards, photo_copies, "--quality", "80"), "quality is 90 there and 80 here"),
        (command(photo_shards, photo_shards), "is the source itself"),
        (command(photo_shards, tmp_path / "out", "--quality", "101"), "--quality 101 is not between 1 and 100"),
        (command(photo_shards, tmp_path / "out", "--workers", "0"), "--workers 0 is less than 1"),
        (
            [*command(tmp_path, tmp_path)[:2], "x.toml", "--out", "out", "--workers", "-1"],
            "--workers -1 is less than 1",
        ),
        (command(tmp_path, tmp_path / "out"), "no .tar shards in it"),
        # Anything but the word is a recipe, as ever.
        ([*command(tmp_path / "x.toml", tmp_path / "out")[:2], "x.toml", "--out", "out"], "x.toml"),
    ]
    for call, reason in calls:
        with pytest.raises(SystemExit) as ended:
            ingest.main(call[2:])
        errors = capsys.readouterr().err
        assert ended.value.code == 2
        assert errors.startswith("error: ")
        assert reason in errors
        assert errors.count("\n") == 1


def test_without_ray_the_command_says_what_to_install(photo_shards: Path, tmp_path: Path) -> None:
    hide = "import sys; sys.modules['ray'] = None; sys.path.insert(0, sys.argv.pop(1)); import ingest; ingest.main()"
    call = [sys.executable, "-c", hide, str(ROOT), *command(photo_shards, tmp_path / "out", "--engine", "ray")[2:]]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --engine ray needs Ray, which is not installed: pip install")


@pytest.mark.slow
def test_ray_makes_the_same_bytes(photo_shards: Path, photo_copies: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    call = command(photo_shards, tmp_path / "out", "--engine", "ray", "--workers", "2")
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out") == tree(photo_copies)
