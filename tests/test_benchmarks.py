"""The loader benchmark: its shards, its rows, what it compares with, and what it says of memory."""

import ast
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import memory, peers, photographs, pipeline
from benchmarks.cases import STANDARD_CASES, Case
from benchmarks.contenders import PEERS_PYTHON, BareDecode, OpenClip, Round, Skipped
from benchmarks.loader_rounds import BARE_FULL, BARE_SCALED, OPEN_CLIP, STOCK, figures
from pipeline.command import exit_code
from pipeline.index import open_index

SAMPLES = 12
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory, photographs: Sequence[np.ndarray]) -> Path:
    """A folder of two photographs, enlarged to what the raw set needs."""
    folder = tmp_path_factory.mktemp("own")
    for number, pixels in enumerate(photographs[:2]):
        Image.fromarray(pixels).resize((1500, 1100)).save(folder / f"photo_{number}.jpg", quality=90)
    return folder


def make_photographs(own: Path, out: Path, samples: int = SAMPLES) -> int:
    arguments = ["--photographs", str(own), "--out", str(out), "--samples", str(samples), "--workers", "1"]
    return photographs.main(arguments)


def members(out: Path) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for path in sorted(out.glob("*/*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                file = tar.extractfile(member)
                assert file is not None
                found[f"{path.parent.name}/{member.name}"] = file.read()
    return found


def test_photographs_become_three_sets(own: Path, tmp_path: Path) -> None:
    out = tmp_path / "sets"
    assert make_photographs(own, out) == 0
    content = members(out)
    for name, size in photographs.SETS.items():
        assert open_index([out / name], progress=False).num_usable == SAMPLES
        assert (out / name / "00000.parquet").exists()
        for i in range(SAMPLES):
            key = f"{name}/00000{i:04d}"
            with Image.open(io.BytesIO(content[f"{key}.jpg"])) as image:
                assert image.format == "JPEG"
                assert size.short_side[0] <= min(image.size) <= size.short_side[1]
                assert 1 <= max(image.size) / min(image.size) <= 1.51
            assert content[f"{key}.txt"]
            assert json.loads(content[f"{key}.json"])["caption"] == content[f"{key}.txt"].decode()
    assert len({content[name] for name in content if name.endswith(".jpg")}) == 3 * SAMPLES

    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")}
    assert make_photographs(own, out) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.tar")} == written

    # Bit for bit the same elsewhere, and after a set was lost half way.
    (out / ".finished").unlink()
    (out / "128" / "00000.parquet").unlink()
    assert make_photographs(own, out) == 0
    assert members(out) == content


def test_other_photographs_are_not_mixed_in(own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "sets"
    assert make_photographs(own, out, samples=2) == 0
    capsys.readouterr()
    assert make_photographs(own, out, samples=3) == 2
    assert capsys.readouterr().err == (
        f"error: --out {out} holds other photographs (samples 2); delete it or give another folder\n"
    )


def test_what_is_missing_is_said_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert photographs.main(["--out", str(tmp_path / "a")]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "apt-get and dpkg-deb" in error
    assert "--photographs DIR" in error
    assert photographs.main(["--out", str(tmp_path / "b"), "--photographs", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "no .jpg or .png file" in error
    Image.new("RGB", (200, 200)).save(tmp_path / "small.png")
    assert photographs.main(["--out", str(tmp_path / "c"), "--photographs", str(tmp_path)]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "none of 1 photographs has 1020 pixels on its short side" in error


def run_pipeline(*arguments: object) -> int:
    small = ("--batch-size", 16, "--batches", 1, "--rounds", 2)
    return pipeline.main(list(map(str, (*arguments, *small))))


def test_rows_and_plot(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot, missing = tmp_path / "out" / "rows.json", tmp_path / "rows.png", tmp_path / "venv" / "bin" / "python"
    code = run_pipeline(
        "--data", shards, "--decoder", "turbo", "--tokens", 16, "--json", out, "--plot", plot, "--peers-python", missing
    )
    assert code == 0
    result = json.loads(out.read_text())
    (row,) = result["rows"]
    assert (row["decoder"], row["tokens"], row["case"], row["data"]) == ("turbo", 16, "64/16", shards.name)
    low, high = row["images_per_cpu_s_range"]
    assert 0 < low <= row["images_per_cpu_s"] <= high
    assert row["images_per_s"] > 0
    assert row["over_open_clip"] is None
    assert row["of_limit"] > 0
    cost_us = sum(row["stage_us"].values())
    assert 1e6 / high * 0.8 < cost_us < 1e6 / low * 1.2, "the stages are all there is"
    assert [peer["decoder"] for peer in result["peers"]] == ["DALI stock", "bare decode, scaled", "bare decode, full"]
    assert result["skipped"] == {OPEN_CLIP: f"{tmp_path / 'venv'} is missing; `make peers` makes it"}
    assert result["environment"]["cores"] >= 1

    printed = capsys.readouterr().out
    assert f"open_clip is left out: {tmp_path / 'venv'} is missing" in printed
    assert "img per CPU s" in printed
    assert "slowest" in printed
    with Image.open(plot) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("L")))) > 10, "something is drawn"


def test_several_sets_both_decoders_and_a_mask(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    twin = tmp_path / shards.name
    twin.symlink_to(shards)
    code = run_pipeline(
        "--data", shards, twin, "--tokens", 49, "--image-reduction", "random", "--no-peers", "--json", out
    )
    assert code == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["data"], row["decoder"]) for row in rows] == [
        (str(folder), decoder) for folder in (shards, twin) for decoder in ("turbo", "dali")
    ]
    assert {(row["case"], row["image_size"], row["image_reduction"]) for row in rows} == {
        ("224->49 random", 224, "random")
    }


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--batches", "0"), "--batches 0 is below 1"),
        (("--seconds", "0"), "--seconds 0.0 is not above 0"),
        (("--tokens", "17"), "the nearest are 16"),
        (("--all-cases", "--tokens", "49"), "--all-cases has its own tokens"),
        (("--batch-size", "1000"), "--batch-size 1000 exceeds the 203 usable samples"),
    ],
)
def test_bad_flags_are_refused_in_a_line(
    shards: Path, arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pipeline.main(["--data", str(shards), *arguments]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert says in errors[0]


def test_cases_are_named_as_in_the_tables() -> None:
    assert [case.name for case in STANDARD_CASES] == [
        "64/16",
        "112/49",
        "224/196",
        "224->49 random",
        "224->49 grid",
        "224->49 block",
    ]


def test_ratios_are_taken_round_by_round() -> None:
    """A machine that halves its speed in one round moves the rates, and no ratio."""

    def turns(rate: float) -> list[Round]:
        return [Round(images=100, cpu_s=100 / (rate * pace), wall_s=1.0, stage_us={}) for pace in (1, 0.5, 0.5)]

    found = figures({"turbo": turns(600), OPEN_CLIP: turns(100), BARE_SCALED: turns(800)})
    assert found["turbo"].images_per_cpu_s == pytest.approx(300)
    assert found["turbo"].images_per_cpu_s_range == pytest.approx((300, 600))
    assert found["turbo"].over_open_clip == pytest.approx(6)
    assert found["turbo"].of_limit == pytest.approx(0.75)
    assert figures({"turbo": turns(600)})["turbo"].over_open_clip is None


def test_bare_decoding_goes_through_whole_batches(shards: Path) -> None:
    index = open_index([shards], progress=False)
    for geometry in (Case(16).geometry, Case(49, "block", 224).geometry, None):
        done = BareDecode(index, geometry, 32).run(3)
        assert done.images == 96
        assert done.cpu_s > 0


PEER = """#!{python}
import json, os, sys
print(json.dumps({{"transform": "none", "pid": os.getpid()}}), flush=True)
for turn, line in enumerate(sys.stdin):
    print("a line of warnings " * 10_000, file=sys.stderr, flush=True)
    if turn == {turns}:
        os.write(1, b'{{"images": ')
        sys.exit("RuntimeError: the disk is gone")
    print(json.dumps({{"images": 16, "cpu_s": 0.01, "wall_s": 0.01}}), flush=True)
"""


def make_peer(folder: Path, turns: int) -> Path:
    """A Python that answers as peers.py does, with more warnings than a pipe holds, and dies in a turn."""
    script = folder / "python"
    script.write_text(PEER.format(python=sys.executable, turns=turns))
    script.chmod(0o755)
    return script


@pytest.mark.parametrize(("turns", "says"), [(1, ""), (3, "64/16: it died in round 2: ")])
def test_a_peer_that_dies_leaves_the_other_rows(shards: Path, tmp_path: Path, turns: int, says: str) -> None:
    """It runs twice to warm up, then once a round."""
    out, peer = tmp_path / "rows.json", make_peer(tmp_path, turns)
    assert run_pipeline("--data", shards, "--decoder", "turbo", "--json", out, "--peers-python", peer) == 0
    result = json.loads(out.read_text())
    assert result["skipped"] == {OPEN_CLIP: f"{says}RuntimeError: the disk is gone (exit status 1)"}
    assert [row["decoder"] for row in result["rows"]] == ["turbo"]
    assert result["rows"][0]["over_open_clip"] is None
    assert result["rows"][0]["of_limit"] > 0
    assert [row["decoder"] for row in result["peers"]] == [STOCK, BARE_SCALED, BARE_FULL]


def test_a_peer_that_was_killed_is_told_at_its_turn(tmp_path: Path) -> None:
    peer = OpenClip([], image_size=64, batch_size=16, workers=0, python=make_peer(tmp_path, 9))
    try:
        assert peer.run(1).images == 16
        os.kill(peer.about["pid"], signal.SIGKILL)
        with pytest.raises(Skipped, match=r"a line of warnings .* \(exit status -9\)"):
            peer.run(1)
    finally:
        peer.close()


@pytest.mark.slow
@pytest.mark.skipif(not PEERS_PYTHON.exists(), reason=".venv-peers is missing; `make peers` makes it")
def test_open_clip_runs_its_own_loader(shards: Path) -> None:
    peer = OpenClip(sorted(shards.glob("*.tar")), image_size=64, batch_size=16, workers=0)
    try:
        assert "RandomResizedCrop(size=(64, 64), scale=(0.4, 1.0)" in peer.about["transform"]
        done = peer.run(3)
        assert done.images == 48
        assert 0 < done.cpu_s < 60
    finally:
        peer.close()


def test_the_peers_script_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(peers.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(imports) > 5
    for node in imports:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
        assert not isinstance(node, ast.ImportFrom) or node.level == 0
        for name in names:
            assert name is not None
            assert name.partition(".")[0] not in {"benchmarks", "pipeline", "model", "training", "evaluation"}


def test_memory_of_a_short_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "memory.json"

    def run(*more: str) -> tuple[dict[str, Any], str]:
        # In a process of its own: this one's memory comes and goes with what other tests have left.
        command = [sys.executable, "-m", "benchmarks.memory", "--data", str(shards), "--batch-size", "16", *more]
        done = subprocess.run([*command, "--json", str(out)], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(out.read_text()), done.stdout

    result, printed = run("--batches", "60")
    assert [step for step, _ in result["looks"]] == list(range(1, 61))
    assert result["end_bytes"] > 50e6
    assert result["peak_bytes"] > 50e6
    assert "turbo, 60 batches of 16, threads 1:" in printed
    with_worker, printed = run("--batches", "40", "--workers", "1")
    # A worker alone holds torch and its libraries.
    assert with_worker["end_bytes"] > result["end_bytes"] + 50e6
    assert "turbo, 40 batches of 16, workers 1:" in printed
    assert memory.main(["--data", str(shards), "--batches", "5"]) == 2
    assert capsys.readouterr().err == "error: --batches 5 is too few for a slope; give at least 40\n"


def test_commands_end_with_a_line_and_a_code(capsys: pytest.CaptureFixture[str]) -> None:
    @exit_code
    def command(error: BaseException | None) -> None:
        if error is not None:
            raise error

    ends = [command(each) for each in (None, ValueError("no such thing"), OSError("no disk"), KeyboardInterrupt())]
    assert ends == [0, 2, 2, 130]
    assert capsys.readouterr().err == "error: no such thing\nerror: no disk\ninterrupted\n"
    with pytest.raises(TypeError):  # a mistake of ours is told as such
        command(TypeError())


def test_a_leak_is_told_from_noise() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(1000) * 20
    noise = rng.normal(0, 1e6, 1000) + 500e6
    flat = memory.growth(list(zip(steps.tolist(), noise.tolist(), strict=True)))
    assert flat.flat
    leaking = memory.growth(list(zip(steps.tolist(), (noise + 1000 * steps).tolist(), strict=True)))
    assert not leaking.flat
    assert leaking.bytes_per_batch == pytest.approx(1000, rel=0.05)
