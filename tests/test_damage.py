"""The benchmark of damaged images, on a small set; and that each damage is what it says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from conftest import write_tar

from benchmarks.damage import main
from benchmarks.damages import DAMAGES, damage_images
from pipeline.decode_dali import DaliDecoder
from pipeline.decode_turbo import TurboDecoder
from pipeline.index import open_index
from pipeline.jpeg import damage as found_by_the_index
from pipeline.plan import whole_windows
from pipeline.tokens import token_geometry

READ_PAST = ("zeroed",)
"""What no decoder can tell from a picture."""


@pytest.mark.parametrize("kind", DAMAGES)
def test_each_damage_keeps_the_size_and_changes_the_bytes(photo_jpegs: list[bytes], kind: Any) -> None:
    rng = np.random.default_rng(0)
    for jpeg in photo_jpegs[:8]:
        damaged = kind(jpeg, rng)
        assert len(damaged) == len(jpeg)
        assert damaged != jpeg
        if kind.__name__ in READ_PAST:
            assert found_by_the_index(damaged) is None


def test_both_decoders_refuse_the_same_and_dali_never_starts_anew(photo_jpegs: list[bytes]) -> None:
    """Of images that were damaged after they were indexed."""
    geometry = token_geometry(16)
    sides = np.array([simplejpeg.decode_jpeg_header(jpeg)[:2] for jpeg in photo_jpegs], np.int32)
    heights, widths = sides[:, 0].copy(), sides[:, 1].copy()
    about = whole_windows(widths, heights), np.tile(np.arange(16, dtype=np.int16), (len(sides), 1)), widths, heights
    dali, turbo = DaliDecoder(geometry, len(sides)), TurboDecoder(geometry)
    pipeline = dali._pipeline
    rng = np.random.default_rng(0)
    for kind in DAMAGES:
        damaged = [kind(jpeg, rng) for jpeg in photo_jpegs]
        one, other = (decoder.decode(damaged, *about).faults for decoder in (dali, turbo))
        assert one == other, kind.__name__
        assert (one == {}) == (kind.__name__ in READ_PAST) or kind.__name__ == "flipped"
    assert dali._pipeline is pipeline


@pytest.fixture
def folder(tmp_path: Path, coloured: Callable[[int], dict[str, Any]]) -> Path:
    write_tar(tmp_path / "data" / "00000.tar", [coloured(number) for number in range(70)])
    write_tar(tmp_path / "data" / "00001.tar", [coloured(number) for number in range(70, 128)])
    return tmp_path / "data"


def test_only_the_chosen_images_are_damaged(folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.glob("*.tar")}
    index = open_index([folder])
    chosen = damage_images(index, folder, 0.25)
    assert chosen == 32
    spans = [
        (Path(info.path).name, offset, size)
        for shard, info in enumerate(index.shards)
        for offset, size in zip(index.rows(shard).image_offset, index.rows(shard).image_bytes, strict=True)
    ]
    changed = 0
    for name, offset, size in spans:
        after = (folder / name).read_bytes()
        changed += after[offset : offset + size] != before[name][offset : offset + size]
        before[name] = before[name][:offset] + after[offset : offset + size] + before[name][offset + size :]
    assert changed == chosen
    assert all((folder / name).read_bytes() == content for name, content in before.items())


def test_the_benchmark_runs_and_says_what_it_did(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "damage.json"
    arguments = ["--data", str(folder), "--share", "0.25", "--batch-size", "16", "--epochs", "2", "--rounds", "1"]
    assert main([*arguments, "--json", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["decoder"], row["damaged"]) for row in rows] == [
        (decoder, when) for decoder in ("turbo", "dali") for when in ("before the index", "after the index")
    ]
    for row in rows:
        seen_by_index = row["damaged"] == "before the index"
        assert (row["rejected_by_index"] > 16) == seen_by_index
        # What the index lets through stops no decoder; behind its back, tables that are missing do.
        assert (row["rejected_by_decoder"] > 0) != seen_by_index
        assert min(row["first_epoch"], row["later_epochs"], row["all_epochs"]) > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--share", "0"), "--share 0.0 is not above 0"),
        (("--epochs", "0"), "--epochs 0 is below 1"),
        (("--batch-size", "4096"), "--batch-size 4096 exceeds the 128 usable samples of the data; lower it"),
    ],
)
def test_what_cannot_be_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    code: int | str | None
    try:
        code = main(["--data", str(folder), *arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr()
    assert said in " ".join((printed.err + printed.out).split())
    assert "Traceback" not in printed.err
