"""Ingestion from the web, with the real img2dataset against a real server on loopback."""

import contextlib
import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import eventually, process_stat, samples_of
from PIL import Image
from trouble_server import Row, Web, encoded, picture, serving, write_metadata

import ingest
from pipeline.ingest import environment, img2dataset, web
from pipeline.ingest.accept import Job, Rules, accept, finished, make_picture
from pipeline.ingest.advice import ADVICE, is_loopback, nothing_kept
from pipeline.ingest.blur import blur_boxes
from pipeline.ingest.fates import _PATTERNS, RETRIED, of_download  # pyright: ignore[reportPrivateUsage]
from pipeline.ingest.passes import Summary
from pipeline.ingest.picture import Unusable
from pipeline.ingest.select import STATUSES, select
from pipeline.ingest.web_recipe import WebRecipe

ROOT = Path(__file__).parents[1]
needs_downloader = pytest.mark.skipif(
    not environment.is_ready(), reason="img2dataset's environment, .venv-ingest, is not made; `make test-full` makes it"
)
"""Making it takes a minute and the network: the slow tests do."""

SAME = {
    "success": "kept", "duplicate url": "duplicate", "not found": "status", "refused by the server": "status",
    "too many requests": "status", "server error": "status", "no connection": "status", "name not found": "status",
    "no caption": "caption", "caption not UTF-8": "caption", "caption too long": "caption",
}  # fmt: skip
"""Our fates -> the server's words, where they differ."""


def recipe(**changes: Any) -> WebRecipe:
    return WebRecipe(metadata="ask someone", license="none", save=("name",), **changes)


def options(path: Path | None, processes: int = 2, **changes: Any) -> web.Options:
    settings = img2dataset.Settings(
        processes=processes, threads=32, timeout_s=5, deadline_s=10, per_host=100, allow_loopback=True
    )
    return web.Options((path,) if path else (), download=settings, **changes)


def rows_of(out: Path) -> list[dict[str, Any]]:
    """The rows of all shards by their number; of a row that was tried again, the last."""
    last: dict[int, dict[str, Any]] = {}
    for path in sorted(out.glob("[0-9]*.parquet")):
        for row in pq.ParquetFile(path).read().to_pylist():
            last[row["row"]] = row
    return [last[number] for number in sorted(last)]


def digest(out: Path) -> str:
    """Of every tar's bytes and every row."""
    hashed = hashlib.sha256()
    for path in sorted(out.glob("*.tar")):
        hashed.update(path.name.encode() + path.read_bytes())
    return hashed.hexdigest() + hashlib.sha256(repr(rows_of(out)).encode()).hexdigest()


def processes_about(folder: Path) -> list[int]:
    """Ids of processes whose command line names a folder."""
    found: list[int] = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    with serving(pictures=120) as running:
        yield running


@pytest.fixture
def fresh(server: Web) -> Web:
    server.reset()
    return server


def steady(server: Web) -> list[Row]:
    """Rows whose fate never depends on when they are asked for, mixed."""
    unsteady = ("503-once", "drip", "silent", "endless", "nobody")
    rows = [row for row in server.rows() if not row.name.startswith(unsteady)]
    random.Random(3).shuffle(rows)
    return rows


# The whole way


def right(row: dict[str, Any], expected: Row) -> bool:
    same_size = row["status"] != "success" or expected.pixels in (None, (row["width"], row["height"]))
    return SAME.get(row["status"], row["status"]) in expected.outcome and same_size


@needs_downloader
def test_what_is_good_is_in_a_shard_and_nothing_else(
    tmp_path: Path, fresh: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole way, without the troubles that take their time; by names from the folder that a person is in."""
    monkeypatch.chdir(tmp_path)
    expected = [row for row in steady(fresh) if not row.name.startswith(("too-large", "bomb"))][::3]
    run_and_check(Path(), fresh, expected, processes=1)


@needs_downloader
def test_where_nothing_is_kept_since_this_machine_is_not_asked_the_flag_for_it_is_named(
    tmp_path: Path, fresh: Web, capsys: pytest.CaptureFixture[str]
) -> None:
    write_metadata(tmp_path / "m.parquet", steady(fresh)[:6])
    recipe_file, out = write_recipe(tmp_path / "r.toml"), tmp_path / "out"
    line = [part for part in command(tmp_path / "m.parquet", out, recipe_file)[2:] if part != "--allow-loopback"]
    # Where nothing is left to do, it is said again.
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            ingest.main(line)
        assert ended.value.code == 2
        said = capsys.readouterr()
        assert "0.0% of them kept" in said.out
        error = said.err.splitlines()[-1]
        assert error.startswith("error: nothing was kept: of ")
        assert "it is `private address`; these URLs are of this machine; to ask it, delete" in error
        assert "--allow-loopback" in error
    assert not [path for path in fresh.requests if path.startswith("/pictures/")]


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("http://127.0.0.1:80/a.jpg", True), ("http://localhost/a", True), ("https://[::1]:9/a", True),
        ("http://10.0.0.1/a", False), ("http://example.com/127.0.0.1", False), ("http://[bad/a", False), ("", False),
    ],
)  # fmt: skip
def test_urls_of_this_machine_are_known(url: str, is_here: bool) -> None:
    assert is_loopback(url) == is_here


def summary_of(fates: dict[str, int]) -> Summary:
    return Summary(sum(fates.values()), 9, 0, fates, 0, 0, 0, 1)


def test_every_fate_has_a_line_of_advice(tmp_path: Path) -> None:
    known = {fate for _, fate in _PATTERNS} | RETRIED | set(STATUSES) | {"too small", "too long", "hash mismatch"}
    for fate in known - {"private address"}:
        said = nothing_kept(summary_of({fate: 5, "other": 4}), tmp_path)
        assert said.startswith(f"nothing was kept: of 5 of 9 rows it is `{fate}`; ")
        assert "{" not in said
        assert ("--retry" in said) == (fate in RETRIED)
    assert ADVICE.keys() <= known | {"no such file", "outside the folder"}


@pytest.mark.parametrize("fate", ["no caption", "caption too long"])
def test_advice_on_own_data_knows_no_recipe_and_names_no_table_that_was_read(tmp_path: Path, fate: str) -> None:
    (tmp_path / "captions.csv").write_text("path,caption\n")
    said = nothing_kept(summary_of({fate: 5}), tmp_path, own=True)
    assert "recipe" not in said
    assert "--metadata" not in said
    assert "captions, and give another --out" in said or "captions of these samples" in said
    if fate == "no caption":
        assert f"add --metadata {tmp_path / 'captions.csv'}" in nothing_kept(
            summary_of({fate: 5}), tmp_path, own=True, bare=tmp_path
        )


@pytest.mark.slow
def test_every_row_has_one_fate_and_nothing_bad_is_in_a_shard(tmp_path: Path, fresh: Web) -> None:
    run_and_check(tmp_path, fresh, fresh.rows()[80:])  # forty pictures will do


def run_and_check(folder: Path, fresh: Web, expected: list[Row], processes: int = 2) -> None:
    metadata, out = folder / "m.parquet", folder / "out"
    write_metadata(metadata, expected)
    summary = web.make(recipe(min_image_size=16), out, options(metadata, processes))
    rows = rows_of(out)
    assert [row["row"] for row in rows] == list(range(len(expected)))
    assert sum(pq.read_metadata(path).num_rows for path in out.glob("[0-9]*.parquet")) == len(expected)
    assert sum(summary.fates.values()) == summary.rows == summary.rows_read == len(expected)
    assert json.loads((out / "summary.json").read_text())["fates"] == summary.fates
    late = {"503-once"}
    wrong = [(row["name"], row["status"], row["error_message"]) for row, should in zip(rows, expected, strict=True)
             if not right(row, should) and row["name"] not in late]  # fmt: skip
    assert wrong == []
    kept = {row["key"]: row for row in rows if row["status"] == "success"}
    samples = samples_of(out)
    assert samples.keys() == kept.keys()
    for key, sample in samples.items():
        assert sample.keys() == {"jpg", "json", "txt"}
        with Image.open(io.BytesIO(sample["jpg"])) as image:
            image.load()
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (kept[key]["width"], kept[key]["height"]))
            assert image.getexif().get(0x0112, 1) == 1
        assert sample["txt"].decode() == kept[key]["caption"].strip("\0") or kept[key]["name"] == "nul-in-caption"
        assert json.loads(sample["json"])["url"] == kept[key]["url"]
    # Nothing that is refused before it is asked for was asked for, and nothing twice but what redirects to it.
    asked = [path for path in fresh.requests if path.startswith("/pictures/")]
    assert len(asked) == len(set(asked))


@pytest.mark.slow
def test_again_there_is_nothing_to_do_and_a_retry_asks_for_what_may_go_well_now(tmp_path: Path, fresh: Web) -> None:
    metadata, out = tmp_path / "m.parquet", tmp_path / "out"
    expected = fresh.rows()
    write_metadata(metadata, expected)
    chosen, settings = recipe(samples_per_shard=70, min_image_size=16), options(metadata)
    summary = web.make(chosen, out, settings)
    before, num_asked = digest(out), len(fresh.requests)
    assert web.make(chosen, out, settings) == summary
    assert (digest(out), len(fresh.requests)) == (before, num_asked)

    fresh.requests.clear()
    retried = web.make(chosen, out, web.Options(download=settings.download, retry=True))
    assert retried.passes == 2
    assert retried.fates["success"] == summary.fates["success"] + 1
    assert sum(retried.fates.values()) == len(expected)
    assert not {path for path in fresh.requests if path in ("/trouble/404", "/trouble/noai", "/trouble/plain")}
    rows = rows_of(out)
    assert all(right(row, should) for row, should in zip(rows, expected, strict=True))
    tried_twice = sum(number for fate, number in summary.fates.items() if fate in RETRIED)
    assert len([row for row in rows if row["attempt"] == 2]) == tried_twice

    done = subprocess.run(
        [sys.executable, "train.py", "--data", out, "--tokens", "16", "--steps", "2", "--batch-size", "32",
         "--out", tmp_path / "run"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rejected = tmp_path / "run" / "rejected.jsonl"
    assert not rejected.exists() or not rejected.read_text()


def command(metadata: Path, out: Path, recipe_file: Path, *more: str) -> list[str]:
    return [
        sys.executable, str(ROOT / "ingest.py"), str(recipe_file), "--metadata", str(metadata), "--out", str(out),
        "--allow-loopback", "--timeout", "30", "--deadline", "60", "--per-host", "200", "--workers", "2",
        "--threads", "16", *more,
    ]  # fmt: skip


def write_recipe(path: Path, more: str = "") -> Path:
    path.write_text(
        f'source = "web"\nmetadata = "ask"\nlicense = "none"\nsave = ["name"]\nsamples_per_shard = 25\n{more}'
    )
    return path


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, server: Web) -> tuple[Path, Path, str, float]:
    """Metadata, a recipe of small shards, what it comes to, and the seconds that it takes."""
    folder = tmp_path_factory.mktemp("whole")
    metadata = folder / "m.parquet"
    write_metadata(metadata, steady(server))
    recipe_file = write_recipe(folder / "recipe.toml")
    begin = time.monotonic()
    subprocess.run(command(metadata, folder / "out", recipe_file), check=True, capture_output=True)
    return metadata, recipe_file, digest(folder / "out"), time.monotonic() - begin


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_killed_at_any_moment_the_same_command_ends_with_the_same_shards(
    tmp_path: Path, uninterrupted: tuple[Path, Path, str, float], seed: int
) -> None:
    metadata, recipe_file, whole, whole_s = uninterrupted
    out, rng = tmp_path / "out", random.Random(seed)
    killed = 0
    for _ in range(4):
        process = subprocess.Popen(
            command(metadata, out, recipe_file), start_new_session=True, stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        with contextlib.suppress(subprocess.TimeoutExpired):
            # The first surely comes, though the machine be faster now than when the whole was timed.
            process.wait(rng.uniform(0.05, 0.6 if killed else 0.3) * whole_s)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        for path in out.glob("*.tar"):
            with tarfile.open(path) as tar:
                assert tar.getmembers()
        assert eventually(lambda: not processes_about(out))
    done = subprocess.run(command(metadata, out, recipe_file), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert killed
    assert digest(out) == whole
    assert not list(out.glob("*.partial"))


@pytest.mark.slow
def test_a_downloader_that_is_killed_or_stands_still_is_started_again(
    tmp_path: Path, uninterrupted: tuple[Path, Path, str, float], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    metadata, _, whole, _ = uninterrupted
    started: list[img2dataset.Download] = []

    class Watched(img2dataset.Download):
        """Killed the first time; the second time it is stopped for good."""

        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

        def idle_s(self) -> float:
            # Its workers bear the same command line, and their numbers may be lower.
            main = [pid for pid in processes_about(self.shards)
                    if b"guard" not in _command_line(pid) and b"guard" in _command_line(_parent(pid))]  # fmt: skip
            if len(started) < 3 and main:
                os.kill(main[0], signal.SIGKILL if len(started) == 1 else signal.SIGSTOP)
            idle_s = super().idle_s()
            return idle_s if len(started) == 2 else 0.0

    monkeypatch.setattr(web, "Download", Watched)
    monkeypatch.setattr(web, "STALLED_S", -55)
    settings = img2dataset.Settings(
        processes=2, threads=16, timeout_s=30, deadline_s=60, per_host=200, allow_loopback=True
    )
    web.make(recipe(samples_per_shard=25), tmp_path / "out", web.Options((metadata,), download=settings))
    assert len(started) == 3
    assert "img2dataset stood still for 5 s; starting it again" in capfd.readouterr().err
    assert digest(tmp_path / "out") == whole


def _command_line(pid: int) -> bytes:
    try:
        return (Path("/proc") / str(pid) / "cmdline").read_bytes()
    except OSError:
        return b""


def _parent(pid: int) -> int:
    return int((process_stat(pid) or ("", 0))[1])


@pytest.mark.slow
@pytest.mark.parametrize("distributor", ["pyspark", "ray"])
def test_engines_of_a_cluster_make_the_same_shards(
    tmp_path: Path, uninterrupted: tuple[Path, Path, str, float], distributor: environment.Distributor
) -> None:
    metadata, recipe_file, whole, _ = uninterrupted
    try:
        environment.check_engine(environment.python(), distributor)
    except ValueError as missing:
        pytest.skip(str(missing))
    done = subprocess.run(
        command(metadata, tmp_path / "out", recipe_file, "--distributor", distributor),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert digest(tmp_path / "out") == whole


# What is refused before anything starts


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe_file, out = write_recipe(tmp_path / "r.toml"), tmp_path / "out"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("")
    write_metadata(tmp_path / "m.parquet", [])
    starter = ROOT / "datasets" / "emoji.toml"
    for arguments, said in (
        ((recipe_file, "--out", out), "--metadata is missing. ask"),
        ((recipe_file, "--out", out, "--shrink", "2"), "--shrink 2 is under 8"),
        ((recipe_file, "--out", out, "--threads", "0"), "--threads 0 is less than 1"),
        ((starter, "--out", out, "--retry"), "--retry is for recipes of web data"),
        (
            (recipe_file, "--out", tmp_path / "other", "--metadata", tmp_path / "m.parquet"),
            "holds other files (letter.txt, ...)",
        ),
    ):
        with pytest.raises(SystemExit) as ended:
            ingest.main([str(argument) for argument in arguments])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
        assert error.count("\n") == 1
    assert not out.exists()


def made(out: Path) -> None:
    """What a finished run leaves, by hand: nothing is downloaded."""
    chosen = recipe()
    folder = out / "_work" / "pass-1"
    folder.mkdir(parents=True)
    select(chosen, [out.parent / "m.parquet"], folder)
    origin = web._origin(chosen, options(out.parent / "m.parquet"))  # pyright: ignore[reportPrivateUsage]
    (out / "recipe.json").write_text(json.dumps(origin))


@pytest.mark.parametrize(
    ("changes", "metadata", "shrink", "said"),
    [
        ({"image_size": 128}, "m.parquet", None, "image_size is 256 there and 128 here"),
        ({}, "other.parquet", None, "--metadata is"),
        ({}, "m.parquet", 64, "shrink is null there and 64 here"),
    ],
)
def test_a_folder_that_was_made_otherwise_is_refused(
    tmp_path: Path, changes: Any, metadata: str, shrink: int | None, said: str
) -> None:
    for name, rows in (("m.parquet", 2), ("other.parquet", 300)):
        table = {"url": ["ftp://a"] * rows, "caption": ["t"] * rows, "name": ["n"] * rows}
        pq.write_table(pa.table(table), tmp_path / name)
    made(tmp_path / "out")
    with pytest.raises(ValueError, match="was made otherwise") as caught:
        web.make(recipe(**changes), tmp_path / "out", options(tmp_path / metadata, shrink=shrink))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@needs_downloader
def test_a_recipe_that_did_not_fit_can_be_corrected(tmp_path: Path) -> None:
    table = {"link": ["ftp://a/1", None], "caption": ["t", "u"], "name": ["n", "m"]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r'no column "url" \(every recipe needs it\)'):
        web.make(recipe(), out, options(tmp_path / "m.parquet"))
    summary = web.make(recipe(columns={"url": ("link",)}), out, options(tmp_path / "m.parquet"))
    assert summary.fates == {"scheme": 1, "bad url": 1}
    assert not list(out.glob("*.tar"))
    # The metadata need not be named again.
    assert web.make(recipe(columns={"url": ("link",)}), out, options(None)) == summary


def test_an_engine_that_is_missing_is_an_error_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This very Python has neither pyspark nor img2dataset beside it.
    with pytest.raises(ValueError, match=r"--distributor pyspark needs pyspark beside img2dataset: `.* -m pip install"):
        environment.check_engine(Path(sys.executable), "pyspark")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(ValueError, match="--distributor pyspark needs Java"):
        environment.check_engine(Path(sys.executable), "pyspark")


# The guard


def test_the_guard_ends_its_whole_group_with_whoever_started_it(tmp_path: Path) -> None:
    script = f"import subprocess, time; subprocess.Popen(['sleep', '987.{os.getpid()}']); time.sleep(600)"
    guard = subprocess.Popen(
        [sys.executable, "-I", img2dataset.GUARD, sys.executable, "-c", script], stdin=subprocess.PIPE,
        start_new_session=True,
    )  # fmt: skip
    name = Path(f"987.{os.getpid()}")
    assert eventually(lambda: len(processes_about(name)) == 3)
    assert guard.stdin is not None
    guard.stdin.close()
    assert guard.wait(60) == -signal.SIGKILL
    assert eventually(lambda: not processes_about(name))


def test_the_guard_hands_on_how_its_command_ended() -> None:
    for code, expected in (("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)):
        done = subprocess.Popen(
            [sys.executable, "-I", img2dataset.GUARD, sys.executable, "-c", code], stdin=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        assert done.wait(240) == expected
        assert done.stdin is not None
        done.stdin.close()


# Accepting

RULES = Rules(256, "keep_ratio", 95, 32, 10, "")


def staged(folder: Path, images: dict[int, bytes], errors: dict[int, str]) -> Path:
    """Writes what img2dataset would have."""
    stem = folder / "00000"
    keys = {row: f"{row:09d}" for row in (*images, *errors)}
    with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
        for row, image in images.items():
            member = tarfile.TarInfo(f"{keys[row]}.jpg")
            member.size = len(image)
            tar.addfile(member, io.BytesIO(image))
    table = {"row": list(keys), "key": list(keys.values()), "error_message": [errors.get(row) for row in keys]}
    pq.write_table(pa.table(table), stem.with_suffix(".parquet"))
    return stem


def work_list(folder: Path, **columns: Any) -> Path:
    rows = len(columns["hash"])
    path = folder / "list.parquet"
    table = {
        "row": list(range(rows)),
        "url": [f"http://a/{i}" for i in range(rows)],
        "caption": [f"number {i}" for i in range(rows)],
        **columns,
        "status": pa.nulls(rows, pa.string()),
    }
    pq.write_table(pa.table(table), path)
    return path


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_a_picture_whose_bytes_have_another_hash_is_left_out(tmp_path: Path, kind: str) -> None:
    images = {i: picture(i) for i in range(4)}
    hashes = [hashlib.new(kind, image).hexdigest() for image in images.values()]
    hashes[1], hashes[2] = hashes[0], None  # type: ignore[call-overload]
    hashes[3] = hashes[3].upper()
    rules = Rules(256, "keep_ratio", 95, 32, 10, kind)
    job = Job(work_list(tmp_path, hash=hashes), staged(tmp_path, images, {}), tmp_path, 7, 1, rules, "none")
    report = accept(job)
    assert report.fates == {"success": 2, "hash mismatch": 2}
    assert samples_of(tmp_path).keys() >= {"000070000", "000070003"}
    assert finished(job.parquet) == report


def test_a_row_that_the_downloader_forgot_can_be_tried_again(tmp_path: Path) -> None:
    stem = staged(tmp_path, {0: picture(0)}, {2: "HTTP Error 404: Not Found"})
    job = Job(work_list(tmp_path, hash=["", "", ""]), stem, tmp_path / "out", 0, 1, RULES, "none")
    (tmp_path / "out").mkdir()
    assert accept(job).fates == {"success": 1, "lost": 1, "not found": 1}
    assert "lost" in RETRIED


def test_a_shard_counts_as_finished_only_with_its_whole_tar(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    stem = staged(tmp_path, {0: picture(0)}, {})
    job = Job(work_list(tmp_path, hash=[""]), stem, out, 0, 1, RULES, "none")
    report = accept(job)
    assert finished(job.parquet) == report
    whole = job.tar.read_bytes()
    job.tar.write_bytes(whole[:-512])
    assert finished(job.parquet) is None
    job.tar.unlink()
    assert finished(job.parquet) is None
    accept(job)
    assert job.tar.read_bytes() == whole
    job.parquet.write_bytes(job.parquet.read_bytes()[:-9])
    assert finished(job.parquet) is None


def test_a_list_without_one_picture_makes_no_tar(tmp_path: Path) -> None:
    stem = staged(tmp_path, {0: b"no picture"}, {1: "HTTP Error 404: Not Found"})
    job = Job(work_list(tmp_path, hash=["", ""]), stem, tmp_path / "out", 0, 1, RULES, "none")
    (tmp_path / "out").mkdir()
    report = accept(job)
    assert (report.fates, report.shard_bytes) == ({"not an image": 1, "not found": 1}, 0)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["00000.parquet"]
    assert finished(job.parquet) == report


@pytest.mark.parametrize(
    ("mode", "size", "made"),
    [
        ("keep_ratio", (600, 400), (300, 200)),
        ("keep_ratio", (150, 400), (150, 400)),
        ("keep_ratio_largest", (600, 400), (200, 133)),
        ("keep_ratio_largest", (150, 100), (150, 100)),
        ("no", (600, 400), (600, 400)),
    ],
)
def test_pictures_come_to_the_recipes_size_and_never_grow(mode: Any, size: Any, made: Any) -> None:
    jpeg = encoded(Image.effect_noise(size, 40).convert("RGB"), "jpg")
    _, copy = make_picture(jpeg, Rules(200, mode, 90, 32, 10, ""), [])
    assert (copy.original_width, copy.original_height) == size
    assert np.abs(np.subtract((copy.width, copy.height), made)).max() <= 1
    if mode == "keep_ratio_largest":
        assert max(copy.width, copy.height) <= 200


@pytest.mark.parametrize(("size", "fate"), [((31, 200), "31 pixels"), ((40, 500), "40 x 500")])
def test_pictures_too_small_or_too_long_are_unusable(size: Any, fate: str) -> None:
    with pytest.raises(Unusable, match=fate):
        make_picture(encoded(Image.new("RGB", size), "png"), RULES, [])


def test_a_grey_picture_becomes_rgb() -> None:
    jpeg, copy = make_picture(encoded(Image.linear_gradient("L"), "jpg"), RULES, [])
    with Image.open(io.BytesIO(jpeg)) as image:
        assert image.mode == "RGB"
        grey = np.asarray(image.convert("L")).astype(int)
    assert copy.change == "retouched"
    assert np.abs(grey - np.asarray(Image.linear_gradient("L")).astype(int)).max() <= 3


def test_faces_are_blurred_and_nothing_else() -> None:
    noise = Image.effect_noise((200, 100), 80).convert("RGB")
    before, after = np.asarray(noise).astype(int), np.asarray(blur_boxes(noise, [[0.5, 0.2, 0.7, 0.8]])).astype(int)
    assert after[30:70, 105:135].std() < before[30:70, 105:135].std() / 3
    assert (after[:, :60] == before[:, :60]).all()
    assert (np.asarray(blur_boxes(noise, [])) == before).all()
    sideways = Image.Exif()
    sideways[0x0112] = 6
    jpeg, _ = make_picture(encoded(noise, "jpg", exif=sideways, quality=95), RULES, [[0.5, 0.2, 0.7, 0.8]])
    with Image.open(io.BytesIO(jpeg)) as image:
        upright = np.asarray(image).astype(int)
    # The boxes are of the stored picture: 100 to 140 across it, which is 100 to 140 down the upright one.
    assert upright.shape == (200, 100, 3)
    assert upright[105:135, 30:70].std() < upright[:60].std() / 3


@pytest.mark.parametrize(
    ("said", "fate", "again"),
    [
        ("HTTP Error 404: Not Found", "not found", False),
        ("HTTP Error 429: Too Many Requests", "too many requests", True),
        ("HTTP Error 500: Internal Server Error", "server error", True),
        ("HTTP Error 403: Forbidden", "refused by the server", False),
        ("HTTP Error 403: private address", "private address", False),
        ("<urlopen error Tunnel connection failed: 403 private address>", "private address", False),
        ("<urlopen error Tunnel connection failed: 502 name not found>", "name not found", True),
        ("<urlopen error timed out>", "too slow", True),
        ("The read operation timed out", "too slow", True),
        ("<urlopen error [Errno 111] Connection refused>", "no connection", True),
        ("[Errno 104] Connection reset by peer", "cut off", True),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed>", "certificate", False),
        ("Use of image disallowed by X-Robots-Tag directive", "opt-out", False),
        ("something that nobody has seen", "other", False),
        ("", "other", False),
    ],
)
def test_what_urllib_says_has_one_fate(said: str, fate: str, again: bool) -> None:
    assert of_download(said) == fate
    assert (fate in RETRIED) == again
    assert of_download("[Errno 104] Connection reset by peer", "too large") == "too large"
