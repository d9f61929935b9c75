import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encode, png, write_tar

from pipeline.index import INDEX_NAME, open_index
from pipeline.scan import MAX_CAPTION_BYTES

Make = Callable[[int], dict[str, Any]]


def test_rows_point_at_the_bytes(shards: Path, coloured: Make) -> None:
    index = open_index([shards])
    assert (index.num_samples, index.num_usable, index.rejected) == (203, 203, {})
    number = 0
    for shard, info in enumerate(index.shards):
        content, rows = Path(info.path).read_bytes(), index.rows(shard)
        for row, key in enumerate(rows.keys):
            sample = coloured(number)
            assert key == sample["__key__"]
            start, size = rows.image_offset[row], rows.image_bytes[row]
            assert content[start : start + size] == sample["jpg"]
            captions = [
                content[rows.caption_offset[i] : rows.caption_offset[i] + rows.caption_bytes[i]]
                for i in range(rows.caption_first[row], rows.caption_first[row + 1])
            ]
            assert captions == [sample["txt"], sample["other.txt"]]
            assert rows.class_id[row] == number % 8
            assert (rows.width[row], rows.height[row]) == (96 + number % 23, 96 + number % 17)
            assert index.locate(number) == (shard, row)
            number += 1


def test_a_second_opening_reads_the_file_and_a_change_is_noticed(tmp_path: Path, coloured: Make) -> None:
    write_tar(tmp_path / "a.tar", [coloured(i) for i in range(5)])
    first = open_index([tmp_path])
    written = (tmp_path / INDEX_NAME).stat().st_mtime_ns
    assert open_index([tmp_path]).digest == first.digest
    assert (tmp_path / INDEX_NAME).stat().st_mtime_ns == written
    # A copy has other times but the same rows.
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copy(tmp_path / "a.tar", copy)
    assert open_index([copy]).digest == first.digest
    moved = tmp_path / "moved"
    shutil.copytree(copy, moved)  # with the index and the times of its files
    assert [info.path for info in open_index([moved]).shards] == [str(moved / "a.tar")]
    write_tar(tmp_path / "a.tar", [coloured(i) for i in range(6)])
    assert open_index([tmp_path]).num_samples == 6
    assert open_index([tmp_path]).digest != first.digest
    (tmp_path / INDEX_NAME).write_bytes(b"not parquet")
    assert open_index([tmp_path]).num_samples == 6


def test_several_sets_are_one_index(tmp_path: Path, coloured: Make) -> None:
    write_tar(tmp_path / "one" / "0.tar", [coloured(i) for i in range(3)])
    write_tar(tmp_path / "two" / "0.tar", [coloured(i) for i in range(3, 8)])
    index = open_index([tmp_path / "one", tmp_path / "two"])
    assert index.usable_ids().tolist() == list(range(8))
    assert [index.rows(shard).keys[row] for shard, row in map(index.locate, range(8))] == [f"{i:09d}" for i in range(8)]


def test_every_bad_sample_is_rejected_for_its_reason(tmp_path: Path, coloured: Make) -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (64, 64, 3)).astype(np.uint8)
    good = encode(noise)
    from io import BytesIO

    from PIL import Image

    stream = BytesIO()
    Image.fromarray(noise).convert("CMYK").save(stream, "JPEG")
    bad: dict[str, dict[str, bytes]] = {
        "no image": {"txt": b"words"},
        "empty image": {"jpg": b"", "txt": b"words"},
        "no caption": {"jpg": good},
        "empty caption": {"jpg": good, "txt": b" \n\0 "},
        "not a JPEG": {"jpg": b"<html>no such picture</html>", "txt": b"words"},
        "image is png, not JPEG": {"png": png(noise), "txt": b"words"},
        "damaged JPEG header": {"jpg": good[:30], "txt": b"words"},
        "JPEG cut off": {"jpg": good[: len(good) // 2], "txt": b"words"},
        "JPEG in YCCK": {"jpg": stream.getvalue(), "txt": b"words"},
        "a side under 8 pixels": {"jpg": encode(noise[:1, :1]), "txt": b"words"},
        "longer than 20 times its width": {"jpg": encode(np.zeros((10, 300, 3), np.uint8)), "txt": b"words"},
        "over 64 megapixels": {"jpg": bomb(good, 30_000), "txt": b"words"},
    }
    samples = [{"__key__": f"bad{i}", **members} for i, members in enumerate(bad.values())]
    write_tar(tmp_path / "0.tar", [*samples, coloured(1)])
    index = open_index([tmp_path])
    assert index.num_usable == 1
    reasons = dict.fromkeys(bad, 1)
    if (cmyk := index.rejected.get("JPEG in CMYK")) is not None:
        reasons["JPEG in CMYK"] = reasons.pop("JPEG in YCCK")
        assert cmyk == 1
    assert index.rejected == dict(sorted(reasons.items()))


def bomb(jpeg: bytes, side: int) -> bytes:
    """The same JPEG with a header that claims side x side pixels."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + side.to_bytes(2, "big") * 2 + jpeg[at + 4 :]


def test_two_members_of_one_name(tmp_path: Path, coloured: Make) -> None:
    sample = coloured(0)
    write_tar(tmp_path / "0.tar", [sample, sample, coloured(1)])
    assert open_index([tmp_path]).rejected == {"two members of the same name": 1}


def test_a_cut_shard_costs_its_tail(tmp_path: Path, coloured: Make, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(tmp_path / "0.tar", [coloured(i) for i in range(10)])
    write_tar(tmp_path / "1.tar", [coloured(i) for i in range(10, 20)])
    whole = (tmp_path / "0.tar").read_bytes()
    with tarfile.open(tmp_path / "0.tar") as tar:
        cut = next(info.offset_data + 10 for info in tar if info.name == "000000004.jpg")
    (tmp_path / "0.tar").write_bytes(whole[:cut])
    (tmp_path / "2.tar").write_bytes(b"")
    index = open_index([tmp_path])
    assert index.shard_sizes.tolist() == [4, 10, 0]
    assert "0.tar: cut off inside 000000004.jpg" in capsys.readouterr().out


def test_long_captions_are_cut_before_they_are_read(tmp_path: Path, coloured: Make) -> None:
    write_tar(tmp_path / "0.tar", [{**coloured(0), "txt": b"word " * 300_000}])
    assert open_index([tmp_path]).rows(0).caption_bytes[0] == MAX_CAPTION_BYTES


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: None, "no such folder"),
        (lambda folder: folder.mkdir(), "no .tar shards"),
        (lambda folder: write_tar(folder / "train" / "0.tar", [{"__key__": "a", "txt": b"x"}]), r"its folder .*train"),
        (
            lambda folder: write_tar(
                folder / "0.tar", [{"__key__": "a", "jpg": encode(np.zeros((9, 9, 3), np.uint8))}]
            ),
            "none of the samples .*: no caption$",
        ),
    ],
)
def test_no_data_is_one_line(tmp_path: Path, prepare: Callable[[Path], None], message: str) -> None:
    folder = tmp_path / "data"
    prepare(folder)
    with pytest.raises(ValueError, match=message) as error:
        open_index([folder])
    assert "\n" not in str(error.value)


def test_a_read_only_folder_is_indexed_in_the_cache(
    tmp_path: Path, coloured: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "data"
    write_tar(folder / "0.tar", [coloured(0)])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert open_index([folder]).num_samples == 1
    assert not (folder / INDEX_NAME).exists()
    assert len(list((tmp_path / "cache").rglob("*.parquet"))) == 1
    assert open_index([folder]).num_samples == 1
