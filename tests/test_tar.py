import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.tar import Damaged, members

names = st.text(st.characters(codec="utf-8", exclude_characters="/\0", categories=("L", "N", "P")), min_size=1)


def build(entries: list[tuple[str, bytes]], dialect: int, **headers: str) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=dialect) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mtime = 1.5 if dialect == tarfile.PAX_FORMAT else 1  # a fraction forces a PAX header
            info.pax_headers = headers
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@settings(max_examples=80)
@given(
    st.lists(st.tuples(names.map(lambda name: name[:60] * 4), st.binary(max_size=1500)), max_size=5),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_every_dialect_reads_as_tarfile_reads_it(entries: list[tuple[str, bytes]], dialect: int) -> None:
    tar = build(entries, dialect)
    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        expected = [(info.name, info.offset_data, info.size) for info in file]
    assert [tuple(member) for member in members(tar)] == expected
    assert [tar[member.offset : member.offset + member.size] for member in members(tar)] == [c for _, c in entries]


def test_ustar_prefix_folders_and_links() -> None:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        folder = tarfile.TarInfo("some")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("some/link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        info = tarfile.TarInfo("d" * 90 + "/" + "e" * 60 + ".jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"abc"))
    found = list(members(stream.getvalue()))
    assert [(member.name, member.size) for member in found] == [("d" * 90 + "/" + "e" * 60 + ".jpg", 3)]


@pytest.mark.parametrize("dialect", [tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_damage_anywhere_keeps_what_stands_before_it(dialect: int) -> None:
    entries = [(f"{i:04d}.jpg", bytes([i]) * (300 * i)) for i in range(5)]
    tar = build(entries, dialect)
    whole = list(members(tar))
    for cut in range(0, len(tar), 97):
        found = []
        try:
            for member in members(tar[:cut]):
                found.append(member)
        except Damaged:
            pass
        else:
            # Only where the end mark has begun may a cut pass unnoticed: nothing is missing then.
            assert len(found) == len(whole)
        assert found == whole[: len(found)]
        assert all(member.offset + member.size <= cut for member in found)
        assert len(found) >= sum(member.offset + member.size <= cut for member in whole)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"\x1f\x8b\x08" + bytes(2000), "gzip"),
        (b"<html>" + b"x" * 1000, "not a tar header"),
        (b"x" * 100, "cut off"),
    ],
)
def test_what_is_no_tar_says_so(content: bytes, reason: str) -> None:
    with pytest.raises(Damaged, match=reason):
        list(members(content))


def test_a_flipped_bit_in_a_header_is_found() -> None:
    tar = bytearray(build([("a.jpg", b"x" * 600), ("b.jpg", b"y")], tarfile.USTAR_FORMAT))
    tar[512 + 1024 + 3] ^= 1
    found = members(bytes(tar))
    assert next(found).name == "a.jpg"
    with pytest.raises(Damaged, match="checksum"):
        next(found)


def test_the_starter_layout_reads_like_tarfile(shards: Path) -> None:
    for path in shards.glob("*.tar"):
        with tarfile.open(path) as file:
            expected = [(info.name, info.offset_data, info.size) for info in file]
        assert [tuple(member) for member in members(path.read_bytes())] == expected


@pytest.mark.parametrize("holes", [1, 40])
def test_sparse_files_and_devices_are_passed_over(tmp_path: Path, holes: int) -> None:
    """As GNU tar writes them; a map of 40 pieces takes two more blocks than a header holds."""
    with (tmp_path / "big.jpg").open("wb") as file:
        for i in range(holes):
            file.seek(((i + 1) * 10 << 30) // holes)
            file.write(b"end")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "after.jpg").write_bytes(b"abc")
    command = ["tar", "--format=gnu", "--sparse", "-cf", "x.tar", "big.jpg", "pipe.jpg", "after.jpg"]
    subprocess.run(command, cwd=tmp_path, check=True)
    tar = (tmp_path / "x.tar").read_bytes()
    assert len(tar) < 1 << 20
    (member,) = members(tar)
    assert (member.name, tar[member.offset : member.offset + member.size]) == ("after.jpg", b"abc")


def test_a_name_longer_than_any_file_system_allows() -> None:
    tar = build([("a.jpg", b"x"), ("b" * 5000, b"y"), ("c.jpg", b"z")], tarfile.GNU_FORMAT)
    found = members(tar)
    assert next(found).name == "a.jpg"
    with pytest.raises(Damaged, match="a name of 5,000 bytes"):
        next(found)
