"""Own pictures as a source: folders, tables, other shards."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import samples_of
from PIL import Image
from trouble_server import draw, encoded

import ingest
from pipeline.ingest import own
from pipeline.scan import MAX_CAPTION_BYTES

ROOT = Path(__file__).parents[1]
FOLDER = own.Options("folder", shrink=100)
SHARDS = own.Options("shards")


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of all shards, in order."""
    return [row for path in sorted(out.glob("[0-9]*.parquet")) for row in pq.ParquetFile(path).read().to_pylist()]


def everything(out: Path) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.tar"))}, rows_of(out)


def write(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def jpeg(number: int, **options: Any) -> bytes:
    return encoded(draw(number), "jpg", **options)


def check(summary: own.Summary, out: Path) -> None:
    """Every row has one state, what is in a shard is sound, and the counts agree."""
    rows, samples = rows_of(out), samples_of(out)
    assert [row["row"] for row in rows] == list(range(summary.rows))
    assert Counter(row["status"] for row in rows) == summary.fates
    kept = {row["key"]: row for row in rows if row["status"] == "success"}
    assert samples.keys() == kept.keys()
    for key, sample in samples.items():
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (kept[key]["width"], kept[key]["height"]))
            assert image.getexif().get(0x0112, 1) == 1
        assert sample["txt"].decode() == kept[key]["caption"] == kept[key]["caption"].strip() != ""
        assert json.loads(sample["json"])["sha256"] == kept[key]["sha256"]


# Folders


def sideways() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def folder_of_pictures(root: Path) -> dict[str, str]:
    """Makes a folder with most of what can be in one; returns the state of each picture by its path."""
    states = {"top.jpg": "no caption"}
    write(root / "top.jpg", jpeg(0))
    for i in range(6):
        write(root / "golden_retriever" / f"{i}.jpg", jpeg(i))
        states[f"golden_retriever/{i}.jpg"] = "success"
    captions: dict[str, tuple[bytes, str]] = {
        "txt": (b"  a text \r\n", "success"),
        "latin": ("gr\u00fcn".encode("latin-1"), "caption not UTF-8"),
        "blank": (b" \n", "no caption"),
        "long": (b"x" * (MAX_CAPTION_BYTES + 1), "caption too long"),
        "mark": ("\ufeffwith a mark".encode(), "success"),
    }
    for i, (name, (caption, state)) in enumerate(captions.items()):
        write(root / "beside" / f"{name}.JPEG", jpeg(10 + i, exif=sideways()))
        write(root / "beside" / f"{name}.txt", caption)
        states[f"beside/{name}.JPEG"] = state
    told: dict[str, tuple[str, str]] = {
        "caption": ('{"caption": "told"}', "success"),
        "text": ('{"text": "told", "score": NaN}', "success"),
        "number": ('{"caption": 7}', "no caption"),
        "broken": ("{", "no caption"),
        "list": ("[1]", "no caption"),
    }
    for i, (name, (text, state)) in enumerate(told.items()):
        write(root / "beside" / "json" / f"{name}.png", encoded(draw(20 + i).convert("RGBA"), "png"))
        write(root / "beside" / "json" / f"{name}.json", text)
        states[f"beside/json/{name}.png"] = state
    write(root / "beside" / "alone.jpg", jpeg(1))
    states["beside/alone.jpg"] = "no caption"
    bad = {
        "cut.jpg": (jpeg(2)[:-600], "damaged"),
        "empty.jpg": (b"", "empty"),
        "page.jpg": (b"<html>", "not an image"),
        "new.heic": (b"\0\0\0\x18ftypheic", "not an image"),
        "tiny.png": (encoded(Image.new("RGB", (4, 4)), "png"), "too small"),
        "wide.png": (encoded(Image.new("RGB", (2000, 40)), "png"), "too long"),
    }
    for name, (content, state) in bad.items():
        write(root / "bad" / name, content)
        states[f"bad/{name}"] = state
    (root / "bad" / "link.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "bad" / "inside.jpg").symlink_to("../top.jpg")
    (root / "bad" / "nowhere.jpg").symlink_to("nothing.jpg")
    (root / "bad" / "folder.jpg").mkdir()
    os.mkfifo(root / "bad" / "pipe.jpg")
    write(root.parent / "secret.jpg", jpeg(3))
    states |= {"bad/link.jpg": "outside the folder", "bad/inside.jpg": "success", "bad/nowhere.jpg": "no such file",
               "bad/pipe.jpg": "cannot be read"}  # fmt: skip
    # Not rows: neither picture nor caption by their names, hidden, or behind a link to a folder.
    write(root / "readme.md", "x")
    write(root / "golden_retriever" / "list.csv", "x")
    write(root / ".hidden" / "x.jpg", jpeg(4))
    write(root / "beside" / "._txt.JPEG", jpeg(4))
    (root / "circle").symlink_to(root)
    return states


def test_every_picture_of_a_folder_has_one_state_and_the_right_caption(tmp_path: Path) -> None:
    states = folder_of_pictures(tmp_path / "pictures")
    summary = own.make(tmp_path / "pictures", tmp_path / "out", FOLDER, 1)
    check(summary, tmp_path / "out")
    rows = {row["path"]: row for row in rows_of(tmp_path / "out")}
    assert {path: row["status"] for path, row in rows.items()} == states
    assert (summary.rows, summary.filtered_out) == (len(states), 3)
    assert rows["golden_retriever/3.jpg"]["caption"] == "golden retriever"
    assert rows["bad/inside.jpg"]["caption"] == "bad"
    captions = [rows[f"beside/{name}"]["caption"] for name in ("txt.JPEG", "mark.JPEG", "json/caption.png")]
    assert captions == ["a text", "with a mark", "told"]
    upright = rows["beside/txt.JPEG"]
    # Stored on its side; its short side is shrunk to 100.
    assert (upright["original_width"] > upright["original_height"]) == (upright["width"] < upright["height"])
    assert min(upright["width"], upright["height"]) == 100
    assert upright["change"] == "shrunk"


def test_neither_workers_nor_an_interruption_change_a_byte(tmp_path: Path) -> None:
    folder_of_pictures(tmp_path / "pictures")
    options = own.Options("folder", shrink=100, samples_per_shard=5)
    one = own.make(tmp_path / "pictures", tmp_path / "one", options, 1)
    assert own.make(tmp_path / "pictures", tmp_path / "two", options, 2) == one
    whole = everything(tmp_path / "one")
    assert everything(tmp_path / "two") == whole
    # As a killed run leaves it: a shard without its parquet, a half-written file, and one more shard not begun.
    out = tmp_path / "two"
    (out / "00001.parquet").unlink()
    (out / "00003.parquet").unlink()
    (out / "00003.tar").unlink()
    write(out / "00003.tar.123.partial", b"half")
    assert own.make(tmp_path / "pictures", out, options, 1) == one
    assert everything(out) == whole
    assert not list(out.glob("*.partial"))


@pytest.mark.slow
def test_killed_at_any_moment_the_same_command_ends_with_the_same_shards_and_training_takes_them(
    tmp_path: Path,
) -> None:
    for i in range(600):
        write(tmp_path / "pictures" / f"kind_{i % 7}" / f"{i}.png", encoded(draw(i, (700, 600)), "png"))
    folder_of_pictures(tmp_path / "pictures")
    command = [sys.executable, str(ROOT / "ingest.py"), "folder", str(tmp_path / "pictures"), "--samples-per-shard",
               "40", "--workers", "2", "--shrink", "64", "--out"]  # fmt: skip
    begin = time.monotonic()
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    whole_s = time.monotonic() - begin
    rng, killed, out = random.Random(5), 0, tmp_path / "out"
    for _ in range(6):
        process = subprocess.Popen(
            [*command, str(out)], start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            # The first surely comes, though the machine be faster now than when the whole was timed.
            process.wait(rng.uniform(0.1, 0.6 if killed else 0.3) * whole_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert killed
    assert everything(out) == everything(tmp_path / "whole")
    done = subprocess.run(
        [sys.executable, "train.py", "--data", out, "--tokens", "16", "--steps", "2", "--batch-size", "32",
         "--out", tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rejected = tmp_path / "run" / "rejected.jsonl"
    assert not rejected.exists() or not rejected.read_text()


# Tables


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_a_table_names_pictures_and_nothing_outside_the_folder_is_opened(tmp_path: Path, suffix: str) -> None:
    root = tmp_path / "pictures"
    for i in range(3):
        write(root / "a" / f"{i}.jpg", jpeg(i))
    write(tmp_path / "secret.jpg", jpeg(3))
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "out").symlink_to(tmp_path)
    # (path, caption) -> state. The table lies in the folder a.
    rows: list[tuple[str | None, str | None, str]] = [
        ("0.jpg", "one", "success"),
        ("0.jpg", "another of the same", "success"),
        ("./../a/1.jpg", "by a detour", "success"),
        (str(root / "a" / "2.jpg"), "by its whole name", "success"),
        ("../../secret.jpg", "x", "outside the folder"),
        ("../link.jpg", "x", "outside the folder"),
        ("../out/secret.jpg", "x", "outside the folder"),
        (str(tmp_path / "secret.jpg"), "x", "outside the folder"),
        ("/etc/passwd", "x", "outside the folder"),
        ("7.jpg", "x", "no such file"),
        ("0.jpg/1.jpg", "x", "no such file"),
        (".", "x", "cannot be read"),
        ("1.jpg", " ", "no caption"),
        ("1.jpg", "x" * 9000, "caption too long"),
        ("n" * 300 + ".jpg", "x", "cannot be read"),
    ]
    table = root / "a" / f"list.{suffix}"
    if suffix == "parquet":
        rows += [(None, "x", "bad path"), ("1.jpg", None, "no caption"), ("1\0.jpg", "x", "bad path")]
        columns = {"file": [row[0] for row in rows], "text": [row[1] for row in rows], "other": list(range(len(rows)))}
        pq.write_table(pa.table(columns), table)
    else:
        rows += [("", "x", "bad path")]
        comma = "," if suffix == "csv" else "\t"
        write(table, "".join(f"{path}{comma}{caption}\n" for path, caption, *_ in [("file", "text"), *rows]))
    options = own.Options("folder", table=table, path_column="file", caption_column="text")
    summary = own.make(root, tmp_path / "out", options, 1)
    check(summary, tmp_path / "out")
    assert [(row["status"]) for row in rows_of(tmp_path / "out")] == [state for *_, state in rows]
    assert [row["caption"] for row in rows_of(tmp_path / "out")][:2] == ["one", "another of the same"]
    assert jpeg(3) not in [sample["jpg"] for sample in samples_of(tmp_path / "out").values()]


def test_text_of_a_table_that_is_not_utf8_costs_its_row_only(tmp_path: Path) -> None:
    write(tmp_path / "p" / "0.jpg", jpeg(0))
    write(tmp_path / "p" / "t.csv", b"path,caption\n0.jpg,gr\xfcn\n\xfc.jpg,x\n0.jpg,good\n")
    own.make(tmp_path / "p", tmp_path / "out", own.Options("folder", table=tmp_path / "p" / "t.csv"), 1)
    assert [row["status"] for row in rows_of(tmp_path / "out")] == ["caption not UTF-8", "bad path", "success"]


# Shards


def shard(path: Path, *members: tuple[str, bytes | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def test_shards_are_checked_and_repaired_and_keep_what_else_a_sample_has(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    whole = jpeg(0)
    shard(
        source / "a.tar",
        ("x/0.jpg", whole), ("x/0.txt", "zero"), ("x/0.tags.txt", "nought, nil"), ("x/0.bad.txt", b"\xff"),
        ("x/0.cls", "7"), ("x/0.json", '{"url": "http://a/0.jpg", "key": "old", "score": NaN, "license": "CC0-1.0"}'),
        ("1.png", encoded(draw(1).convert("RGBA"), "png")), ("1.txt", b"\xff"), ("1.alt.txt", "the other"),
        ("2.jpg", jpeg(2, exif=sideways())), ("2.txt", "two"),
        ("3.jpg", jpeg(3)[:-700]), ("3.txt", "three"),
        ("4.txt", "four"),
        ("5.jpg", jpeg(5)),
        ("6.jpg", jpeg(6)), ("6.JPG", jpeg(6)), ("6.txt", "six"),
        ("7.jpg", jpeg(7)), ("7.txt", b"\xff"),
        ("8.jpg", encoded(draw(8).convert("CMYK"), "jpg")), ("8.txt", "eight"),
    )  # fmt: skip
    shard(source / "b.tar", ("0.jpg", jpeg(20)), ("0.txt", "first"), ("1.jpg", jpeg(21)), ("1.txt", "second"))
    cut = (source / "b.tar").read_bytes()
    write(source / "b.tar", cut[: cut.index(jpeg(21)) + 50])
    write(source / "c.tar", b"")
    summary = own.make(source, out, own.Options("shards", samples_per_shard=4), 1)
    check(summary, out)
    rows = {(row["shard"], row["source_key"]): row for row in rows_of(out)}
    assert {key: row["status"] for key, row in rows.items()} == {
        ("a.tar", "x/0"): "success", ("a.tar", "1"): "success", ("a.tar", "2"): "success", ("a.tar", "3"): "damaged",
        ("a.tar", "4"): "no image", ("a.tar", "5"): "no caption", ("a.tar", "6"): "two members of the same name",
        ("a.tar", "7"): "caption not UTF-8", ("a.tar", "8"): "success", ("b.tar", "0"): "success",
    }  # fmt: skip
    assert summary.problems.keys() == {"b.tar", "c.tar"}
    assert "cut off inside 1.jpg" in summary.problems["b.tar"]
    changes = {row["source_key"]: row["change"] for row in rows.values() if row["shard"] == "a.tar"}
    assert [changes[key] for key in ("x/0", "1", "2", "8")] == ["kept", "converted", "turned", "converted"]
    samples = samples_of(out)
    first = samples[rows["a.tar", "x/0"]["key"]]
    assert (first["jpg"], first["tags.txt"], first["cls"]) == (whole, b"nought, nil", b"7")
    assert first.keys() == {"jpg", "txt", "json", "tags.txt", "cls"}
    told = json.loads(first["json"])
    assert (told["url"], told["license"], told["score"]) == ("http://a/0.jpg", "CC0-1.0", None)
    assert told["key"] == rows["a.tar", "x/0"]["key"] == "000000000"
    assert samples[rows["a.tar", "1"]["key"]]["txt"] == b"the other"


def test_shards_made_again_are_the_same_but_for_their_size(tmp_path: Path) -> None:
    members = [
        (f"{i}.{kind}", jpeg(i) if kind == "jpg" else f"number {i}") for i in range(9) for kind in ("jpg", "txt")
    ]
    shard(tmp_path / "source" / "0.tar", *members)
    own.make(tmp_path / "source", tmp_path / "one", SHARDS, 1)
    own.make(tmp_path / "one", tmp_path / "two", SHARDS, 2)
    own.make(tmp_path / "one", tmp_path / "small", own.Options("shards", shrink=64), 1)
    one, two, small = (samples_of(tmp_path / name) for name in ("one", "two", "small"))
    assert [(s["jpg"], s["txt"]) for s in one.values()] == [(s["jpg"], s["txt"]) for s in two.values()]
    assert [sample["jpg"] for sample in one.values()] == [jpeg(i) for i in range(9)]
    assert [sample["txt"] for sample in one.values()] == [sample["txt"] for sample in small.values()]
    assert {min(row["width"], row["height"]) for row in rows_of(tmp_path / "small")} == {64}


# What has changed


def same_size_other_bytes(path: Path) -> None:
    """As an edited file: the same length, a later time."""
    content = path.read_bytes()
    write(path, content[:-3] + bytes(3))
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def captioned(root: Path) -> None:
    for i in range(6):
        write(root / "a" / f"{i}.jpg", jpeg(i))
        write(root / "a" / f"{i}.txt", f"number {i}")


def change_of_a_folder(root: Path, kind: str) -> None:
    if kind == "added":
        write(root / "a" / "4a.jpg", jpeg(7))
        write(root / "b" / "7.jpg", jpeg(7))
    elif kind == "gone":
        (root / "a" / "5.jpg").unlink()
    elif kind == "caption":
        write(root / "a" / "2.txt", "number ?")
    elif kind == "no caption":
        (root / "a" / "2.txt").unlink()
    elif kind == "picture":
        same_size_other_bytes(root / "a" / "2.jpg")
    else:
        (root / "a" / "0.jpg").rename(root / "a" / "9.jpg")
        (root / "a" / "0.txt").rename(root / "a" / "9.txt")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("added", "2 added (a/4a.jpg, ...)"),
        ("gone", "1 gone (a/5.jpg)"),
        ("caption", "1 with another caption (a/2.jpg)"),
        ("no caption", "1 with another caption (a/2.jpg)"),
        ("picture", "1 changed (a/2.jpg)"),
        ("renamed", "1 added (a/9.jpg); 1 gone (a/0.jpg)"),
    ],
)
def test_a_folder_that_has_changed_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, said: str
) -> None:
    root, out = tmp_path / "p", tmp_path / "out"
    captioned(root)
    command = ("folder", root, "--out", out, "--workers", "1", "--samples-per-shard", "4")
    ingest.main([str(argument) for argument in command])
    before = everything(out)
    change_of_a_folder(root, kind)
    error = refused(capsys, *command)
    assert error == (
        f"error: {root} has changed since {out} was begun: {said}. Choose another --out, or delete {out}; "
        "what only came in addition can be a source of its own: train.py --data A B"
    )
    assert everything(out) == before


def test_what_makes_no_other_pair_is_not_a_change(tmp_path: Path) -> None:
    root, out = tmp_path / "p", tmp_path / "out"
    captioned(root)
    write(root / "a" / "6.jpg", jpeg(6))  # without a caption: it is never opened
    (root / "a" / "7.jpg").symlink_to("nothing")
    write(root / "a" / "7.txt", "seven")
    options = own.Options("folder", samples_per_shard=4)
    made = own.make(root, out, options, 1)
    assert made.fates == {"success": 6, "no caption": 1, "no such file": 1}
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (1, 1))
    same_size_other_bytes(root / "a" / "6.jpg")
    write(root / "notes.md", "x")
    write(root / "a" / ".hidden.jpg", jpeg(0))
    assert own.make(root, out, options, 1) == made
    # A picture of a list that is still to be read is read as it is; one whose list was read has changed.
    (out / "00000.parquet").unlink()
    write(root / "a" / "1.jpg", jpeg(11))
    own.make(root, out, options, 1)
    sums = {row["path"]: row["sha256"] for row in rows_of(out)}
    assert sums["a/1.jpg"] == hashlib.sha256(jpeg(11)).hexdigest()
    own.make(root, out, options, 1)
    write(root / "a" / "1.jpg", jpeg(12))
    with pytest.raises(ValueError, match=r"1 changed \(a/1.jpg\)"):
        own.make(root, out, options, 1)


def test_a_folder_whose_lists_say_nothing_of_files_goes_on(tmp_path: Path) -> None:
    root, out = tmp_path / "p", tmp_path / "out"
    captioned(root)
    made = own.make(root, out, FOLDER, 1)
    for path in (out / "_work" / "pass-1").glob("*.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["own_file"]), path)
    assert own.make(root, out, FOLDER, 1) == made
    write(root / "a" / "2.txt", "another")
    with pytest.raises(ValueError, match="1 with another caption"):
        own.make(root, out, FOLDER, 1)


def test_a_table_that_has_changed_is_refused_even_where_it_is_as_long(tmp_path: Path) -> None:
    root, out, table = tmp_path / "p", tmp_path / "out", tmp_path / "p" / "t.csv"
    captioned(root)
    options = own.Options("folder", table=table)
    lines = ["path,caption", "a/0.jpg,one", "a/0.jpg,two", "a/1.jpg,six", "a/9.jpg,not there"]
    write(table, "\n".join(lines))
    made = own.make(root, out, options, 1)
    os.utime(table, (1, 1))
    assert own.make(root, out, options, 1) == made
    for changed, said in (
        ([*lines[:3], "a/1.jpg,ten", lines[4]], r"1 with another caption \(a/1.jpg\)"),
        ([*lines, "a/3.jpg,three"], r"1 added \(a/3.jpg\)"),
        ([lines[0], lines[3], *lines[1:3], lines[4]], "its rows are in another order"),
        (lines[:3], r"2 gone \(a/1.jpg, ...\)"),
    ):
        write(table, "\n".join(changed))
        with pytest.raises(ValueError, match=said):
            own.make(root, out, options, 1)
    write(table, "\n".join(lines))
    write(root / "a" / "9.jpg", jpeg(9))
    with pytest.raises(ValueError, match=r"1 changed \(a/9.jpg\)"):
        own.make(root, out, options, 1)
    (root / "a" / "9.jpg").unlink()
    (root / "a" / "0.jpg").unlink()
    with pytest.raises(ValueError, match=r"2 changed \(a/0.jpg, ...\)"):
        own.make(root, out, options, 1)


def test_shards_that_have_changed_are_refused_even_where_they_are_as_long(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    members = [
        (f"{i}.{kind}", jpeg(i) if kind == "jpg" else f"number {i}") for i in range(3) for kind in ("jpg", "txt")
    ]
    shard(source / "a.tar", *members, ("2.cls", "7"))
    shard(source / "b.tar", *members)
    made = own.make(source, out, SHARDS, 1)
    assert own.make(source, out, SHARDS, 1) == made
    shard(source / "c.tar", *members[:2])
    with pytest.raises(ValueError, match=r"source has changed since .*: 1 added \(c.tar: 0\)"):
        own.make(source, out, SHARDS, 1)
    (source / "c.tar").unlink()
    shard(source / "a.tar", *members, ("2.cls", "8"))
    os.utime(source / "a.tar", (1, 1))
    with pytest.raises(ValueError, match=r"3 changed \(a.tar: 0, ...\)"):
        own.make(source, out, SHARDS, 1)
    (source / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"3 gone \(a.tar: 0, ...\)"):
        own.make(source, out, SHARDS, 1)


# What is refused


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as ended:
        ingest.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err.splitlines()
    # A progress bar may stand before it.
    assert error[-1].startswith("error: ")
    assert len([line for line in error if line.startswith(("error", "Traceback"))]) == 1
    return error[-1]


def test_where_nothing_is_kept_the_commonest_reason_is_an_error_with_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "p", tmp_path / "out"
    write(source / "0.jpg", jpeg(0))
    write(source / "1.jpg", jpeg(1))
    command = ("folder", source, "--out", out, "--workers", "1")
    for _ in range(2):
        said = refused(capsys, *command)
        assert "nothing was kept: of all 2 rows it is `no caption`; put each caption into the .txt file" in said
    table = source / "lists" / "captions.csv"
    write(table, "path,caption\n../0.jpg,one\n../1.jpg,two\n")
    said = refused(capsys, *command)
    assert said.endswith(f"{table} lies there: if it holds the captions, delete {out} and add --metadata {table}")
    # What it says, works.
    shutil.rmtree(out)
    ingest.main([*map(str, command), "--metadata", str(table)])
    assert "2 pairs in 1 shards" in capsys.readouterr().out


def test_a_table_that_no_flag_names_is_pointed_at_where_folders_give_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "p" / "cats" / "0.jpg", jpeg(0))
    write(tmp_path / "p" / "captions.csv", "path,caption\ncats/0.jpg,one\n")
    own.make(tmp_path / "p", tmp_path / "out", FOLDER, 1)
    said = capsys.readouterr().err.splitlines()[0]
    assert said.startswith(f"note: no picture has a caption file, and {tmp_path / 'p' / 'captions.csv'} lies there")
    # Not where captions stand beside the pictures, nor where the table is named.
    write(tmp_path / "p" / "cats" / "0.txt", "a cat")
    own.make(tmp_path / "p", tmp_path / "beside", FOLDER, 1)
    own.make(tmp_path / "p", tmp_path / "table", own.Options("folder", table=tmp_path / "p" / "captions.csv"), 1)
    assert "note" not in capsys.readouterr().err


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out, other = tmp_path / "source", tmp_path / "out", tmp_path / "other"
    write(source / "a" / "0.jpg", jpeg(0))
    write(source / "table.csv", "path,caption\nb/0.jpg,x\nb/1.jpg,y\n")
    write(source / "good.csv", "path,caption\na/0.jpg,x\n")
    write(other / "letter.txt", "x")
    (tmp_path / "nothing").mkdir()
    for arguments, said in (
        (("folder", tmp_path / "no", "--out", out), "no such folder"),
        (("folder", tmp_path / "nothing", "--out", out), "no pictures in it"),
        (("folder", source, "--out", source / "out"), "lies in the source"),
        (("folder", source, "--out", other), "holds other files (letter.txt, ...)"),
        (("folder", source, "--out", out, "--workers", "0"), "--workers 0 is less than 1"),
        (("folder", source, "--out", out, "--shrink", "2"), "--shrink 2 is outside 8"),
        (("folder", source, "--out", out, "--min-image-size", "2"), "--min-image-size 2 is under 8"),
        (("folder", source, "--out", out, "--samples-per-shard", "0"), "--samples-per-shard 0 is outside"),
        (("folder", source, "--out", out, "--metadata", source / "no.csv"), "no such file"),
        (("folder", source, "--out", out, "--metadata", source / "table.csv", "--path-column", "file"),
         'no column "file" for path (--path-column); they have: path, caption. Say what the table calls it: '
         "--path-column"),
        (("folder", source, "--out", out, "--metadata", source / "table.csv"), "none of its first 2 files is there"),
        (("shards", tmp_path / "nothing", "--out", out), "no .tar shards in it; give the folder"),
        (("shards", source, "--out", out), f"but pictures: python ingest.py folder {source} --out DIR"),
        (("shrink", source, "--out", out), f"but pictures: python ingest.py folder {source} --out DIR"),
        ((source, "--out", out), f"is a folder, no recipe; of pictures: python ingest.py folder {source} --out DIR"),
    ):  # fmt: skip
        assert said in refused(capsys, *arguments)
    # What was refused leaves nothing that stands in the way of the right command, which then runs, and again.
    for _ in range(2):
        ingest.main(
            ["folder", str(source), "--out", str(out), "--metadata", str(source / "good.csv"), "--workers", "1"]
        )
        assert "1 pairs in 1 shards" in capsys.readouterr().out
    assert (out / "report.png").exists()
    said = refused(capsys, "folder", source, "--out", out)
    assert "was made otherwise: --metadata is" in said
    assert "shrink is 256 there and 64 here" in refused(
        capsys, "folder", source, "--out", out, "--metadata", source / "good.csv", "--shrink", "64"
    )
