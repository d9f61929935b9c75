import gzip
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import encode, eventually, png, process_stat, write_tar

from pipeline.index import INDEX_NAME, open_index
from pipeline.read import Reader
from pipeline.scan import MAX_CAPTION_BYTES, index_shard
from pipeline.sources import Shard

ROOT = Path(__file__).parents[1]

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
                for i in range(rows.caption_first[row], rows.caption_first[row] + rows.num_captions[row])
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


def test_odd_members_touch_nothing_outside(tmp_path: Path, coloured: Make) -> None:
    """Names are labels: nothing is ever unpacked, so ../ leads nowhere, and links and devices hold no sample."""
    sample = coloured(0)
    folder = tmp_path / "data"
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, content in (("../../up.jpg", sample["jpg"]), ("../../up.txt", sample["txt"]), ("/abs.txt", b"x")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
        for name, kind in (("link.jpg", tarfile.SYMTYPE), ("hard.jpg", tarfile.LNKTYPE), ("null.jpg", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    index = open_index([folder])
    assert list(index.rows(0).keys) == ["../../up", "/abs"]
    assert (index.num_usable, index.rejected) == (1, {"no image": 1})
    reader = Reader(index)
    assert reader.images(reader.locate_ids(index.usable_ids())) == [sample["jpg"]]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["0.tar", INDEX_NAME, "data"]


def test_a_member_of_10_gb_is_rejected(tmp_path: Path, coloured: Make) -> None:
    write_tar(tmp_path / "0.tar", [coloured(0)])
    info = tarfile.TarInfo("huge.jpg")
    info.size = 10 << 30
    with (tmp_path / "0.tar").open("r+b") as file:
        file.seek(-1024, os.SEEK_END)
        file.write(info.tobuf(tarfile.GNU_FORMAT) + b"\xff\xd8\xff")
        file.truncate(file.tell() + info.size + 1021)  # a hole on disk, and the end mark
    index = open_index([tmp_path])
    assert (index.num_usable, index.rejected) == (1, {"image file over 64 MiB": 1})


def test_a_shard_of_too_many_members_costs_the_rest(tmp_path: Path, coloured: Make) -> None:
    write_tar(tmp_path / "0.tar", [coloured(i) for i in range(10)])
    with (tmp_path / "0.tar").open("rb") as file:
        shard = Shard(str(tmp_path / "0.tar"), 0, "")
        table, info = index_shard(shard, file.fileno(), max_members=20)
        assert index_shard(shard, file.fileno(), max_members=40)[1].problem is None
    assert (len(table), info.usable, info.problem) == (5, 5, "more than 20 members")


@pytest.mark.slow
def test_memory_and_time_hold_for_a_million_members_and_for_bombs(tmp_path: Path, coloured: Make) -> None:
    jpeg = coloured(0)["jpg"]
    side = (30_000).to_bytes(4, "big")
    bomb_png = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + side * 2 + b"\x08\x02\0\0\0" + bytes(100)
    write_tar(
        tmp_path / "0.tar",
        [
            {"__key__": "a", "jpg": bomb(jpeg, 30_000), "txt": b"x"},
            {"__key__": "b", "png": bomb_png, "txt": b"x"},
            {"__key__": "c", "jpg": bomb_png, "txt": b"x"},
            coloured(1),
        ],
    )
    header = tarfile.TarInfo("0000000.txt").tobuf(tarfile.USTAR_FORMAT)
    with (tmp_path / "1.tar").open("wb") as file:
        for start in range(0, 1_000_000, 100_000):
            headers = np.tile(np.frombuffer(header, np.uint8), (100_000, 1))
            numbers = np.arange(start, start + 100_000)
            digits = numbers[:, None] // 10 ** np.arange(6, -1, -1) % 10
            headers[:, :7] += digits.astype(np.uint8)
            sums = int(header[148:154], 8) + digits.sum(1)
            headers[:, 148:154] = sums[:, None] // 8 ** np.arange(5, -1, -1) % 8 + ord("0")
            file.write(headers.tobytes())
        file.write(bytes(1024))
    code = """
import sys
from pathlib import Path
import pipeline.index
def peak():  # not getrusage: its peak is inherited from the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
before = peak()
index = pipeline.index.open_index([Path(sys.argv[1])], progress=False)
print((peak() - before) // 1024)
print(index.num_usable, index.shards[-1].problem, index.rejected)
"""
    results = []
    for shards in (("0.tar",), ("0.tar", "1.tar")):
        folder = tmp_path / str(len(shards))
        folder.mkdir()
        for name in shards:
            os.link(tmp_path / name, folder / name)
        command = [sys.executable, "-c", code, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=400)
        results.append(done.stdout.splitlines()[-2:])
    (bombs_mib, bombs), (members_mib, _) = results
    assert int(bombs_mib) < 50
    assert bombs == "1 None {'image is png, not JPEG': 1, 'not a JPEG': 1, 'over 64 megapixels': 1}"
    assert results[1][1].startswith("1 more than 400,000 members")
    assert int(members_mib) < 1000  # of it, 400 MiB are the file's own pages, which the kernel may take back


def test_captions_of_every_kind(tmp_path: Path, coloured: Make) -> None:
    texts = {
        "a plain one": None,
        "": "empty caption",
        " \t\r\n": "empty caption",
        "\0\0": "empty caption",
        "nul \0 inside": None,
        "שלום 🦊 مرحبا": None,
        "\ufeff\u202eevil": None,
    }
    samples = [{**coloured(i), "txt": text.encode()} for i, text in enumerate(texts)]
    samples.append({**coloured(90), "txt": b"\xff\xfe not UTF-8"})
    for sample in samples:
        del sample["other.txt"]
    write_tar(tmp_path / "0.tar", samples)
    index, reader = open_index([tmp_path]), Reader(open_index([tmp_path]))
    assert index.rejected == {"empty caption": 3}
    rows = reader.locate_ids(index.usable_ids())
    good = [sample["txt"] for sample, reason in zip(samples, [*texts.values(), None], strict=True) if reason is None]
    assert reader.captions(rows, np.zeros(len(good), np.int64)) == good


def test_what_is_no_shard_costs_itself_or_is_named(tmp_path: Path, coloured: Make) -> None:
    write_tar(tmp_path / "0.tar", [coloured(0)])
    (tmp_path / "1.tar").mkdir()
    os.mkfifo(tmp_path / "2.tar")
    (tmp_path / "3.tar").write_bytes(gzip.compress((tmp_path / "0.tar").read_bytes()))
    (tmp_path / "4.tar").touch()
    index = open_index([tmp_path])
    problems = [info.problem for info in index.shards]
    assert problems == [
        None,
        "not a file",
        "not a file",
        "compressed with gzip, not a plain tar; gunzip it",
        "an empty file",
    ]
    assert index.num_usable == 1
    (tmp_path / "5.tar").symlink_to(tmp_path / "gone.tar")
    with pytest.raises(ValueError, match=r"5\.tar: a link to nothing"):
        open_index([tmp_path])
    for path in tmp_path.glob("[05].tar"):
        path.unlink()
    with pytest.raises(ValueError, match=r"none of the samples in its 4 shards can be used: .*not a file$"):
        open_index([tmp_path])


def test_workers_change_nothing_and_large_sets_have_several_files(tmp_path: Path, coloured: Make) -> None:
    for i in range(10):
        write_tar(tmp_path / f"{i}.tar", [coloured(4 * i + j) for j in range(1 + i % 3)])
    whole = open_index([tmp_path], workers=1)
    keys = [list(whole.rows(shard).keys) for shard in range(10)]
    content = (tmp_path / INDEX_NAME).read_bytes()
    for workers in (2, 3):
        (tmp_path / INDEX_NAME).unlink()
        assert open_index([tmp_path], workers=workers).digest == whole.digest
        assert (tmp_path / INDEX_NAME).read_bytes() == content
    (tmp_path / INDEX_NAME).unlink()
    index = open_index([tmp_path], part_shards=4)
    files = [tmp_path / name for name in (INDEX_NAME, "_index-00001.parquet", "_index-00002.parquet")]
    assert sorted(tmp_path.glob("_index*")) == sorted(files)
    assert (index.digest, index.source_shards) == (whole.digest, (10,))
    assert [list(index.rows(shard).keys) for shard in range(10)] == keys
    # A build that was killed goes on with what is missing, and a change costs its own file.
    times = [path.stat().st_mtime_ns for path in files]
    files[2].unlink()
    write_tar(tmp_path / "5.tar", [coloured(77)])
    assert open_index([tmp_path], part_shards=4).num_samples == index.num_samples - 2
    assert [path.stat().st_mtime_ns == before for path, before in zip(files, times, strict=True)] == [
        True,
        False,
        False,
    ]


def test_a_killed_build_leaves_nothing_half_written_and_no_worker(tmp_path: Path, coloured: Make) -> None:
    for i in range(300):
        write_tar(tmp_path / f"{i:03d}.tar", [coloured(i)])
    code = """
import sys
from pipeline import build, index
if __name__ == "__main__":
    index.open_index([sys.argv[1]], progress=False, workers=2)
"""
    (tmp_path / "run.py").write_text(code)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment)
    partial = tmp_path / f"{INDEX_NAME}.{process.pid}.partial"
    children: list[str] = []
    # The file is begun before its workers, of which there are two, and a process that looks after what they share.
    while not partial.exists() or len(children) < 3:
        assert process.poll() is None
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(0.001)
    process.kill()
    process.wait()
    assert not (tmp_path / INDEX_NAME).exists()
    assert open_index([tmp_path]).num_samples == 300
    assert eventually(lambda: not any(process_stat(int(child)) for child in children)), "a worker outlived its parent"


def test_a_worker_that_dies_is_one_line(tmp_path: Path, coloured: Make) -> None:
    for i in range(4):
        write_tar(tmp_path / f"{i}.tar", [coloured(i)])
    code = """
import os, sys
from pipeline.index import open_index
if __name__ != "__main__":
    os._exit(1)
open_index([sys.argv[1]], progress=False, workers=2)
"""
    (tmp_path / "run.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert re.search(r"ValueError: .*/\d\.tar: a worker process died while indexing it", done.stderr)
    assert not list(tmp_path.glob("_index*"))


def test_processes_that_start_together_build_once(tmp_path: Path, coloured: Make) -> None:
    for i in range(40):
        write_tar(tmp_path / f"{i:02d}.tar", [coloured(j) for j in range(20)])
    code = "import sys; from pipeline.index import *; print(open_index([sys.argv[1]]).usable_ids().sum())"
    command = [sys.executable, "-c", code, str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for _ in range(3)]
    # Built twice, the one who came first would find its file replaced and refuse to go on.
    assert {process.communicate(timeout=600)[0] for process in running} == {f"{800 * 799 // 2}\n"}


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
