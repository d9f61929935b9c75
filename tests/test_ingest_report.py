"""What a person sees of an ingestion: the report, the status and what they are made from."""

import fcntl
import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from trouble_server import draw, encoded

import ingest
from pipeline.ingest.accept import Job, Report, Rules, accept, finished, retryable
from pipeline.ingest.chart import draw as draw_chart
from pipeline.ingest.passes import Passes, summarise
from pipeline.ingest.progress import BEGINNING, JOURNAL_NAME, Moment, Progress, merged, read_journal, stretches
from pipeline.ingest.staged import Staged
from pipeline.ingest.statistics import Spread, statistics
from pipeline.ingest.tables import duration, expected_s, report_text, size, status_text, top_places
from pipeline.ingest.work_lists import Plan, finish, list_path, write_lists
from pipeline.table import format_table

RULES = Rules(100, "keep_ratio", 95, 32, 10, "")
HOSTS = ("a.example", "b.example", "user:pw@B.example:8080", "[::1]:80", "$x^{2}$.example", "b\u00fccher.example")


def write_web(out: Path, rows: int, left: int = 0) -> None:
    """Makes what a web run of two passes leaves, with hosts of every kind; `left` lists of the last are not done."""
    passes = Passes(out / "_work")
    work = out / "staged"
    work.mkdir(parents=True)
    table = pa.table(
        {
            "row": list(range(rows)),
            "url": [f"http://{HOSTS[i % len(HOSTS)]}/{i}.jpg" for i in range(rows - 1)] + [None],
            "caption": [f"number {i} " * (1 + i % 5) for i in range(rows)],
            "status": pa.array([None] * (rows - 1) + ["bad url"], pa.string()),
        }
    )

    def plan(folder: Path) -> Plan:
        number, total = write_lists([table], folder, 0, 20)
        finish(folder, Plan(0, number, total, total, 0))
        return Plan(0, number, total, total, 0)

    def again(folder: Path) -> Plan:
        tables = [retryable(list_path(out, list_id)) for list_id in first.lists]
        number, total = write_lists([table for table in tables if table.num_rows], folder, first.num_lists, 20)
        made = Plan(first.num_lists, number, total, total, 0)
        finish(folder, made)
        return made

    def run(plan: Plan, attempt: int, lists: list[int]) -> None:
        with Progress(plan.rows, [], passes.work, "downloading") as progress:
            for list_id in lists:
                path = list_path(passes.folder(attempt), list_id)
                stem = stage(work, pq.read_table(path).to_pylist(), attempt)
                progress.add(accept(Job(path, stem, out, list_id, attempt, RULES, "none")))

    first = passes.begin(plan)
    run(first, 1, list(first.lists))
    second = passes.begin(again)
    run(second, 2, list(second.lists)[: second.num_lists - left])


def stage(folder: Path, rows: list[dict[str, Any]], attempt: int) -> Path:
    """Writes what img2dataset would have: of 4 rows one is not found, one too slow the first and sometimes again."""
    stem = folder / "00000"
    said: dict[int, str | None] = {}
    with tarfile.open(stem.with_suffix(".tar"), "w") as tar:
        for row in rows:
            number = row["row"]
            said[number] = {0: "HTTP Error 404: Not Found", 1: "timed out"}.get(number % 4)
            if number % 4 == 1 and attempt == 2 and number % 3:
                said[number] = None
            if said[number] is None and row["status"] is None:
                member = tarfile.TarInfo(f"{number:09d}.jpg")
                jpeg = encoded(draw(number, (120 + number, 300)), "jpg")
                member.size = len(jpeg)
                tar.addfile(member, io.BytesIO(jpeg))
    columns = {"row": list(said), "key": [f"{number:09d}" for number in said], "error_message": list(said.values())}
    pq.write_table(pa.table(columns), stem.with_suffix(".parquet"))
    return stem


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("web") / "out"
    write_web(out, 60)
    return out


def last_rows(out: Path) -> list[dict[str, Any]]:
    last: dict[int, dict[str, Any]] = {}
    for path in sorted(out.glob("[0-9]*.parquet")):
        last |= {row["row"]: row for row in pq.ParquetFile(path).read().to_pylist()}
    return list(last.values())


def test_the_counts_are_those_of_each_rows_last_fate(web: Path) -> None:
    found, rows = statistics(web), last_rows(web)
    fates = Counter(row["status"] for row in rows)
    assert found.fates == fates == summarise(web, Passes(web / "_work")).fates
    assert found.rows == 60
    assert fates.keys() >= {"success", "too slow", "not found"}
    kept = [row for row in rows if row["status"] == "success"]
    assert found.changes == Counter(row["change"] for row in kept)
    for spread, values in (
        (found.original, [min(row["original_width"], row["original_height"]) for row in kept]),
        (found.stored, [min(row["width"], row["height"]) for row in kept]),
        (found.captions, [len(row["caption"]) for row in kept]),
    ):
        assert {i: int(n) for i, n in enumerate(spread.counts) if n} == Counter(values)
    host = {"user:pw@B.example:8080": "b.example", "[::1]:80": "[::1]"}
    expected = [host.get(name, name) for name in (HOSTS[i % len(HOSTS)] for i in range(59))]
    assert found.places == Counter([*expected, "(none)"])
    by_row = {row["row"]: row["status"] for row in rows}
    assert +found.kept == Counter(name for i, name in enumerate(expected) if by_row[i] == "success")
    assert sum(rows for _, rows, _ in top_places(found, 2)) == 60
    assert sum(kept for *_, kept in top_places(found, 2)) == found.num_kept
    assert sum(part.rows for part in found.time) == 60 + 15


def test_the_report_is_printed_and_drawn_with_the_same_numbers(web: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest.main(["report", str(web)])
    text = capsys.readouterr().out
    for fate, number in Counter(row["status"] for row in last_rows(web)).items():
        assert any(line.split()[: len(fate.split()) + 1] == [*fate.split(), str(number)] for line in text.splitlines())
    assert "b\\xfccher.example" in text
    assert text.isascii()
    with Image.open(web / "report.png") as image:
        image.load()
        assert min(image.size) > 1000
        found = image.convert("RGB").getcolors(1 << 24) or []
        colours = {colour for _, colour in found if isinstance(colour, tuple)}
    assert {(0x1A, 0x7F, 0x37), (0xC2, 0x62, 0x0A), (0x25, 0x63, 0xA8)} <= colours


def test_status_says_what_is_left_and_what_it_costs(tmp_path: Path, web: Path) -> None:
    out = tmp_path / "out"
    write_web(out, 180, left=1)
    plan = Passes(out / "_work").plans[1]
    left = plan.rows - sum(
        pq.read_metadata(list_path(out, i)).num_rows for i in plan.lists if list_path(out, i).exists()
    )
    # A row of an unfinished retry is left. It is neither done nor to be retried, though it has a fate of before.
    again = Counter(row["status"] for row in last_rows(out))["too slow"] - left
    lines = {line.split("  ")[0]: line.split() for line in status_text(out).splitlines()}
    assert left > 0
    assert again > 0
    assert lines["done"][1] == str(180 - left)
    assert lines["left"][1] == str(left)
    assert f"can be retried: {again} too slow" in status_text(out)
    assert lines["can be retried"][3] == str(again)
    parts = stretches(read_journal(out / "_work"))
    expected = expected_s(parts, left)
    assert expected is not None
    assert duration(expected) in " ".join(lines["left"])
    # Each image is as large as those that came.
    reports = [report for path in out.glob("[0-9]*.parquet") if (report := finished(path))]
    each = sum(report.downloaded_bytes for report in reports) / sum(
        report.fates.get("success", 0) for report in reports
    )
    assert size(again * each) in " ".join(lines["can be retried"])
    assert "nothing is left to do" not in status_text(out)
    assert "a run is going on" not in status_text(out)
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "a run is going on" in status_text(out)


def test_the_rows_of_retries_that_were_interrupted_again_and_again_are_counted_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_web(out, 180)
    passes = Passes(out / "_work")
    second = passes.plans[-1]
    tables = [retryable(list_path(out, list_id)) for list_id in second.lists]

    def plan(folder: Path) -> Plan:
        first = second.first_list + second.num_lists
        number, total = write_lists([table for table in tables if table.num_rows], folder, first, 10)
        finish(folder, Plan(first, number, total, total, 0))
        return Plan(first, number, total, total, 0)

    def counts() -> tuple[int, int, int]:
        """Done, left, can be retried."""
        lines = {line.split("  ")[0]: line.split() for line in status_text(out).splitlines()}
        return int(lines["done"][1]), int(lines["left"][1]), int(lines["can be retried"][3])

    done, left, again = counts()
    assert (done, left) == (180, 0)
    third = passes.begin(plan)
    assert third.num_lists > 1
    for list_id in third.lists:
        assert counts() == (180 - again, again, 0) if list_id == third.first_list else sum(counts()[:2]) == 180
        path = list_path(passes.folder(3), list_id)
        stem = stage(out / "staged", pq.read_table(path).to_pylist(), 2)
        accept(Job(path, stem, out, list_id, 3, RULES, "none"))
    # All that failed the second time fails the third time too.
    assert counts() == (180, 0, again)


def test_before_the_first_shard_there_is_a_status_and_no_report(tmp_path: Path) -> None:
    (tmp_path / "_work").mkdir()
    assert "were not all listed; run the same command again" in status_text(tmp_path)

    def plan(folder: Path) -> Plan:
        finish(folder, made)
        return made

    made = Plan(0, 1, 7, 7, 0)
    Passes(tmp_path / "_work").begin(plan)
    lines = {line.split("  ")[0]: line.split() for line in status_text(tmp_path).splitlines()}
    assert lines["left"][1:4] == ["7", "unknown", "unknown"]
    with pytest.raises(ValueError, match="no finished shards"):
        statistics(tmp_path)


def test_without_the_work_lists_there_is_still_a_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    write_web(out, 40)
    before = statistics(out)
    (out / "_work").rename(tmp_path / "away")
    after = statistics(out)
    assert (after.fates, after.places, after.time) == (before.fates, before.places, [])
    ingest.main(["report", str(out)])
    assert "working time" not in capsys.readouterr().out
    assert "is gone" in status_text(out)


def test_where_nothing_was_kept_there_is_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.jpg").write_bytes(b"")
    with pytest.raises(SystemExit) as ended:
        ingest.main(["folder", str(tmp_path / "p"), "--out", str(tmp_path / "out"), "--workers", "1"])
    assert ended.value.code == 2
    assert statistics(tmp_path / "out").fates == {"no caption": 1}
    assert "least" not in report_text(statistics(tmp_path / "out"), tmp_path / "out")
    assert "nothing is left to do" in status_text(tmp_path / "out")


@pytest.mark.parametrize("verb", ["report", "status"])
def test_other_folders_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other" / "00000.parquet")
    (tmp_path / "other" / "00001.parquet").write_bytes(b"no parquet")
    for folder in ("missing", "empty", "other"):
        with pytest.raises(SystemExit) as ended:
            ingest.main([verb, str(tmp_path / folder)])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert "ingest.py --out named" in error


def test_more_domains_than_memory_takes_are_counted_together(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = statistics(web)
    monkeypatch.setattr("pipeline.ingest.statistics.MAX_PLACES", 4)
    found = statistics(web)
    assert len(found.places) <= 5
    assert (sum(found.places.values()), sum(found.kept.values())) == (60, whole.num_kept)


# The journal


def test_a_journal_that_was_cut_off_loses_one_line_only(tmp_path: Path) -> None:
    journal = tmp_path / JOURNAL_NAME
    lines = [json.dumps(Moment(float(i), 10, 5, 100).__dict__) for i in range(1, 4)]
    journal.write_text("\n".join(lines)[:-7])
    with Progress(10, [], tmp_path, "reading"):
        pass
    with journal.open("a") as file:
        file.write(lines[0] + "\n[1]\n")
    assert [moment.run_s for moment in read_journal(tmp_path)] == [1.0, 2.0, 0.0, 1.0]
    assert read_journal(tmp_path / "nowhere") == []


def test_the_images_of_lists_in_work_are_counted_as_they_come(tmp_path: Path) -> None:
    """In tars as img2dataset writes them, cut at many a byte, in parts, and taken away when they are accepted."""
    whole = {}
    for number, names in enumerate((("a", "b", "c"), ("d",))):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in names:
                for suffix, content in ((".jpg", b"x" * 700), (".json", b"{}"), (".txt", b"")):
                    member = tarfile.TarInfo(name + suffix)
                    # A broken second gives each member a header of its own before it, as webdataset's writer does.
                    member.size, member.mtime = len(content), 1.5  # pyright: ignore[reportAttributeAccessIssue]
                    tar.addfile(member, io.BytesIO(content))
        whole[tmp_path / f"{number}.tar"] = stream.getvalue()
    staged = Staged(tmp_path)
    counts: list[int] = []
    for end in range(0, max(map(len, whole.values())) + 300, 300):
        for path, content in whole.items():
            path.write_bytes(content[:end])
        staged.look()
        counts.append(staged.images)
        assert staged.image_bytes == 700 * staged.images
        assert staged.tar_bytes == sum(min(end, len(content)) for content in whole.values())
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (0, 4)
    assert len(set(counts)) > 2
    (tmp_path / "0.tar").unlink()
    staged.look()
    assert staged.images == 1


def test_the_line_shows_what_has_come_before_a_list_is_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.ingest.progress._BEAT_S", 0.0)
    (tmp_path / "shards").mkdir()
    with Progress(10, [], tmp_path, "downloading") as progress:
        with tarfile.open(tmp_path / "shards" / "00000.tar", "w") as tar:
            tar.addfile(tarfile.TarInfo("0.jpg"))
        progress.beat(Staged(tmp_path / "shards"))
        first = capsys.readouterr().err
        (tmp_path / "shards" / "00000.tar").unlink()
        progress.add(Report({"success": 3, "not found": 1}, {}, 100, 100))
        progress.beat(Staged(tmp_path / "shards"))
    then = capsys.readouterr().err
    assert "1 images in work" in first
    assert "kept" not in first
    assert "75.0% kept" in then
    assert "in work" not in then


runs = st.lists(st.lists(st.tuples(st.floats(0.01, 100), st.integers(1, 50)), min_size=1, max_size=8), max_size=5)


@given(runs, st.integers(1, 9))
def test_working_time_is_that_of_all_runs_without_what_lies_between(
    told: list[list[tuple[float, int]]], most: int
) -> None:
    moments: list[Moment] = []
    clocks = [np.cumsum([step for step, _ in run]) for run in told]
    for run, clock in zip(told, clocks, strict=True):
        moments.append(BEGINNING)
        moments += [Moment(float(s), rows, rows // 2, 7 * rows) for s, (_, rows) in zip(clock, run, strict=True)]
    parts = stretches(moments)
    assert [part.rows for part in parts] == [rows for run in told for _, rows in run]
    assert [part.is_first for part in parts] == [i == 0 for run in told for i in range(len(run))]
    assert np.isclose(sum(part.seconds for part in parts), sum(clock[-1] for clock in clocks))
    fewer = merged(parts, most)
    assert len(fewer) <= most
    for name in ("seconds", "rows", "kept", "downloaded_bytes"):
        assert np.isclose(sum(getattr(part, name) for part in fewer), sum(getattr(part, name) for part in parts))
    if parts:
        assert fewer[-1].end_s == parts[-1].end_s
        seconds = expected_s(parts, 10)
        assert seconds is not None
        assert seconds > 10 * parts[-1].end_s / sum(part.rows for part in parts)
    else:
        assert expected_s(parts, 10) is None


@given(st.lists(st.integers(0, 300), min_size=1), st.floats(0, 1))
def test_percentiles_are_exact(values: list[int], share: float) -> None:
    spread = Spread(200)
    spread.add(np.array(values[: len(values) // 2], np.int64))
    spread.add(np.array(values[len(values) // 2 :], np.int64))
    clipped = np.minimum(values, 200)
    assert spread.percentile(share) == np.quantile(clipped, share, method="inverted_cdf")
    edges = [0, 7, 150]
    assert spread.within(edges).tolist() == np.histogram(clipped, [*edges, 1000])[0].tolist()


def test_tables_have_aligned_columns_and_numbers_have_units() -> None:
    lines = format_table(("name", "n"), [("a", "1,000"), ("longer name", "2")]).splitlines()
    assert lines == ["name             n", "-----------  -----", "a            1,000", "longer name      2"]
    assert [size(n) for n in (0, 999, 2.5e6, 3e9, 5e15)] == ["0.0 kB", "1.0 kB", "2.5 MB", "3.0 GB", "5,000.0 TB"]
    told = [duration(s) for s in (0, 4.25, 60, 600, 7200, 864000)]
    assert told == ["0 s", "4.2 s", "60 s", "10 min", "2.0 h", "10.0 days"]


def test_the_chart_takes_any_name(tmp_path: Path, web: Path) -> None:
    draw_chart(statistics(web), "$\\frac{ \u4e2d\u6587 " + "x" * 200, tmp_path / "r.png")
    with Image.open(tmp_path / "r.png") as image:
        assert image.format == "PNG"
