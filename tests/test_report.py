import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evaluation.lettering import drawable, fitted, text_width_pt
from evaluation.report import Sheet, draw, percent, read_metrics, size_pixels
from pipeline.table import format_table

AWKWARD = [r"heavy $\frac$ sign", "日本語 名前", "two\nlines", "W" * 90, "100% {c} \\frac", "✓"]


def write_metrics(run: Path, entries: list[dict[str, Any]]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return run


def steps(num: int, **last: Any) -> list[dict[str, Any]]:
    entries = [{"step": i, "samples_seen": 64 * i, "loss": 5 / i} for i in range(1, num + 1)]
    entries[-1] |= last
    return entries


def make_sheet(num_pictures: int, **changes: Any) -> Sheet:
    rng = np.random.default_rng(0)
    names = [AWKWARD[i % len(AWKWARD)] for i in range(num_pictures)]
    fields: dict[str, Any] = {
        "zero_shot_top1": 0.25,
        "num_images": 100,
        "num_classes": 10,
        "pictures": [rng.integers(0, 256, (40 + i, 64, 3), np.uint8) for i in range(num_pictures)],
        "true_names": names,
        "best_names": [[name if i % 2 else "cat", "dog", name] for i, name in enumerate(names)],
        "scores": [[0.9, 0.005, float("nan")]] * num_pictures,
        "pixel_baseline": 0.05,
    }
    return Sheet(**(fields | changes))


@pytest.mark.parametrize(
    ("entries", "sheet"),
    [
        (steps(60, zero_shot_top1=0.2), make_sheet(7)),
        (steps(1), make_sheet(0, pixel_baseline=None)),
        (steps(3, loss=float("nan"), zero_shot_top1=None), make_sheet(1, zero_shot_top1=0.0, pixel_baseline=0.0)),
        ([{"step": 0, "samples_seen": 0}], make_sheet(0, zero_shot_top1=1.0, num_classes=1)),
    ],
)
def test_a_report_of_any_run_is_a_png_of_the_stated_size(
    tmp_path: Path, entries: list[dict[str, Any]], sheet: Sheet
) -> None:
    run = write_metrics(tmp_path / r"日本 $\frac$", entries)  # pytest turns any warning of matplotlib's into an error
    out = tmp_path / "deep" / "report.png"
    draw(run, out, sheet)
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.size == size_pixels(sheet)
        assert len(np.unique(np.asarray(image.convert("L")))) > 20
    assert [file.name for file in out.parent.iterdir()] == ["report.png"]


def test_a_right_picture_is_framed_green_and_a_wrong_one_is_not(tmp_path: Path) -> None:
    run = write_metrics(tmp_path, steps(2))
    green = []
    for best in ("cat", "dog"):
        grey = np.full((8, 8, 3), 128, np.uint8)
        draw(
            run, tmp_path / "out.png", make_sheet(1, true_names=["cat"], best_names=[[best, "a", "b"]], pictures=[grey])
        )
        with Image.open(tmp_path / "out.png") as image:
            pixels = np.asarray(image.convert("RGB"))[700:]  # below the charts
        green.append(int((np.abs(pixels.astype(int) - (0x1A, 0x7F, 0x37)).max(axis=-1) < 12).sum()))
    assert green[0] > 1000
    assert green[1] == 0


def test_only_so_many_pictures_are_drawn() -> None:
    assert size_pixels(make_sheet(500)) == size_pixels(make_sheet(48))
    assert size_pixels(make_sheet(7)) == size_pixels(make_sheet(12)) > size_pixels(make_sheet(6))
    with pytest.raises(AssertionError, match="differ in number"):
        make_sheet(3, true_names=["cat"])


def test_metrics_lose_only_a_torn_last_line(tmp_path: Path) -> None:
    entries = steps(3)
    write_metrics(tmp_path, entries)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "samp')
    assert read_metrics(tmp_path) == entries


def test_a_run_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"metrics\.jsonl is missing; give the folder that train\.py --out named"):
        draw(tmp_path, tmp_path / "report.png", make_sheet(0))
    write_metrics(tmp_path, [])
    with pytest.raises(ValueError, match=r"metrics\.jsonl is empty; train for a few steps first"):
        draw(tmp_path, tmp_path / "report.png", make_sheet(0))
    assert not (tmp_path / "report.png").exists()


def test_text_is_cut_to_its_width() -> None:
    assert fitted("red apple", 1000, 10) == "red apple"
    assert drawable("aé✓日\a") == "aé✓□□"
    for text in [*AWKWARD, "flag: South Georgia & South Sandwich Islands"]:
        for width in (30, 80, 120):
            cut = fitted(text, width, 10)
            assert text_width_pt(cut, 10) <= width
            assert "\n" not in cut
    assert fitted("flag: South Georgia & South Sandwich Islands", 100, 10).startswith("flag: South")


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0%"), (1, "100.0%"), (0.413, "41.3%"), (0.045, "4.5%"), (1 / 1847, "0.054%"), (0.000001, "0.0001%"),
        (float("nan"), "nan%"),
    ],
)  # fmt: skip
def test_percent_keeps_two_digits_of_a_small_share(share: float, text: str) -> None:
    assert percent(share) == text


def test_table_columns_are_aligned() -> None:
    table = format_table(["measure", "value"], [["zero_shot_top1", "41.3%"], ["chance", "0.054%"]])
    assert table.split("\n") == [
        "measure          value",
        "--------------  ------",
        "zero_shot_top1   41.3%",
        "chance          0.054%",
    ]
    assert format_table(["a", "b"], []) == "a  b\n-  -"
