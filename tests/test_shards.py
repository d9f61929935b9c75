import itertools
import json
import os
import tarfile
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.files import only_writer, write_text
from pipeline.ingest.shards import Sample, Shard, split_shards, write_shard, write_shards

words = st.text(st.characters(codec="utf-8"), max_size=40)
samples = st.builds(
    Sample,
    jpeg=st.binary(max_size=2000),
    width=st.integers(1, 4000),
    height=st.integers(1, 4000),
    caption=words,
    url=words,
    license=words,
    style=words,
    name=st.none() | words,
    other_captions=st.dictionaries(st.sampled_from(["tags", "short"]), words),
    class_id=st.none() | st.integers(0, 9999),
    details=st.dictionaries(st.sampled_from(["objects", "source"]), st.lists(st.integers() | words)),
)


def identity(sample: Sample) -> Sample:
    return sample


def numbered(number: int) -> Sample:
    return Sample(bytes([number % 256]) * number, 8, 8, f"number {number}", f"test:{number}", "MIT", "plain")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=60)
@given(st.lists(samples, max_size=5), st.integers(0, 99_999))
def test_write_then_read_is_identity(given_samples: list[Sample], shard_id: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        shard = Shard(Path(folder), shard_id, given_samples, identity)
        assert not shard.complete
        write_shard(shard)
        assert shard.complete
        assert sorted(contents(Path(folder))) == [f"{shard_id:05d}.parquet", f"{shard_id:05d}.tar"]
        rows = pq.read_table(shard.parquet).to_pylist()
        with tarfile.open(shard.tar) as tar:
            members = [(member.name.split(".", 1), tar.extractfile(member)) for member in tar]
            read = {
                key: {name[1]: stream.read() for name, stream in group if stream is not None}
                for key, group in itertools.groupby(members, lambda entry: entry[0][0])
            }
    # groupby sees a key twice when another's members stand between, so equal keys mean adjacent members.
    assert list(read) == [f"{shard_id:05d}{row:04d}" for row in range(len(given_samples))]
    assert [row["key"] for row in rows] == list(read)
    for sample, row, found in zip(given_samples, rows, read.values(), strict=True):
        details = json.loads(found.pop("json"))
        assert {**details, **row} == details
        assert details["captions"] == [sample.caption, *sample.other_captions.values()]
        assert {key: details[key] for key in sample.details} == sample.details
        assert (row["caption"], row["width"], row["height"]) == (sample.caption, sample.width, sample.height)
        assert (row["status"], row["license"], row["style"]) == ("success", sample.license, sample.style)
        expected = {"jpg": sample.jpeg, "txt": sample.caption.encode()}
        expected |= {f"{word}.txt": caption.encode() for word, caption in sample.other_captions.items()}
        if sample.class_id is not None:
            expected["cls"] = str(sample.class_id).encode()
        assert found == expected


def test_the_webdataset_library_reads_them(tmp_path: Path) -> None:
    from webdataset.tariterators import group_by_keys, tar_file_expander

    shard = Shard(tmp_path, 3, [numbered(i) for i in range(5)], identity)
    write_shard(shard)
    with shard.tar.open("rb") as stream:
        read = list(group_by_keys(tar_file_expander([{"url": str(shard.tar), "stream": stream}])))
    assert [sample["__key__"] for sample in read] == [f"00003{row:04d}" for row in range(5)]
    assert [sample["txt"] for sample in read] == [f"number {i}".encode() for i in range(5)]


@given(st.integers(0, 50), st.integers(1, 12))
def test_shards_hold_every_plan_once_in_order(count: int, samples_per_shard: int) -> None:
    shards = split_shards(Path("out"), range(count), numbered, samples_per_shard)
    assert [plan for shard in shards for plan in shard.plans] == list(range(count))
    assert [shard.shard_id for shard in shards] == list(range(len(shards)))
    assert all(len(shard.plans) == samples_per_shard for shard in shards[:-1])


def test_a_failure_keeps_whole_shards_and_the_next_run_makes_only_the_rest(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw(number: int) -> Sample:
        drawn.append(number)
        if number == 25 and len(drawn) == 26:
            raise RuntimeError("the lights went out")
        return numbered(number)

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    write_shards(split_shards(whole, range(40), numbered, 10), 1, lambda shard: None)
    shards = split_shards(broken, range(40), draw, 10)
    with pytest.raises(RuntimeError, match="the lights went out"):
        write_shards(shards, 1, lambda shard: None)
    assert [shard.complete for shard in shards] == [True, True, False, False]
    assert sorted(contents(broken)) == ["00000.parquet", "00000.tar", "00001.parquet", "00001.tar"]
    # What a killed process leaves: a tar cut short under its other name, and a whole tar whose parquet never came.
    (broken / "00002.tar.99.partial").write_bytes(b"cut")
    (broken / "00003.tar").write_bytes(b"of another run")
    drawn.clear()
    done: list[int] = []
    write_shards(shards, 1, lambda shard: done.append(shard.shard_id))
    assert done == [2, 3]
    assert drawn == list(range(20, 40))
    assert contents(broken) == contents(whole)
    drawn.clear()
    write_shards(shards, 1, lambda shard: None)
    assert drawn == []


def test_a_dead_worker_is_one_line(tmp_path: Path) -> None:
    shards = [Shard(tmp_path, i, [3], os._exit) for i in range(2)]  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"a worker process died .* --workers 1"):
        write_shards(shards, 2, lambda shard: None)


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    refused = pytest.raises(ValueError, match="another process is writing to")
    with only_writer(folder), refused, only_writer(folder):
        pass
    with only_writer(folder):
        pass


def test_text_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    write_text(tmp_path / "names.txt", "café\n")
    assert contents(tmp_path) == {"names.txt": "café\n".encode()}
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "names.txt", "\ud800")
    assert contents(tmp_path) == {"names.txt": "café\n".encode()}
