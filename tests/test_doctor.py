"""The doctor: each rule held to numbers, and a real run of the probes on small shards."""

import os
import re
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from benchmarks import doctor
from benchmarks.doctor_rules import RULES, Readings, advise
from pipeline.index import open_index
from training.config import Config, parse, resolved

HEALTHY = Readings(
    device="cuda",
    cores=16,
    threads=4,
    workers=0,
    prefetch=3,
    batch_size=4096,
    probed_batch=1024,
    decoder="turbo",
    loader_rate=8000,
    loader_per_cpu_s=2100,
    stages_us={"order": 10, "plan": 20, "read": 20, "decode": 350, "captions": 40},
    step_rate=5400,
    step_per_cpu_s=50_000,
    joint_rate=5300,
    data_wait_fraction=0.01,
    storage_mb_per_s=900,
    image_bytes=25_000,
    short_side=256,
    image_size=64,
    mfu=0.4,
    precision="bf16",
    compiled=True,
    memory_gib=20,
    memory_needed_gib=60,
    memory_there_gib=80,
)
"""A run on a GPU in which the model is the limit."""
STARVED = replace(HEALTHY, threads=1, loader_rate=2100, joint_rate=2050, data_wait_fraction=0.6)


def test_a_run_that_the_model_limits_needs_nothing() -> None:
    advice = advise(HEALTHY)
    assert (advice.bottleneck, advice.change) == ("the model", "nothing: the loader keeps up")
    assert "40% of the device's peak" in advice.why


@pytest.mark.parametrize("step_rate", [2500, 5400, 11_000, 1e6])
def test_threads_are_as_many_as_the_model_needs_and_the_cores_allow(step_rate: float) -> None:
    advice = advise(replace(STARVED, step_rate=step_rate, storage_mb_per_s=None))
    flag, number = advice.change.split()
    threads = int(number)
    assert flag == "--threads"
    assert threads * 2100 >= step_rate or threads == 15  # a core is left to the step
    assert (threads - 1) * 2100 < 1.1 * step_rate
    assert advice.gain == pytest.approx(min(step_rate, threads * 2100) / 2100)


def test_where_the_cores_are_used_up_threads_are_no_advice() -> None:
    advice = advise(replace(STARVED, threads=1, cores=2))
    assert "--threads" not in advice.change


def test_threads_that_hold_each_other_up_become_workers() -> None:
    advice = advise(replace(STARVED, threads=8, loader_rate=5000, step_rate=20_000, storage_mb_per_s=None))
    assert advice.change == "--workers 8"
    assert advice.gain == pytest.approx(8 * 2100 / 5000)


def test_the_same_of_slow_storage_is_not_blamed_on_python() -> None:
    advice = advise(replace(STARVED, threads=8, loader_rate=5000, step_rate=20_000, storage_mb_per_s=16))
    assert advice.bottleneck == "storage"


def test_slow_storage_asks_for_smaller_copies_or_a_faster_disk() -> None:
    slow = replace(STARVED, storage_mb_per_s=30, loader_rate=1200, joint_rate=1200)
    advice = advise(slow)
    assert advice.bottleneck == "storage"
    assert "30 MB/s" in advice.why
    assert "disk" in advice.change
    assert advice.gain == pytest.approx(5400 / 1200)
    small = replace(slow, shrunk_side=96, shrunk_bytes=5_000, shrunk_per_cpu_s=2200)
    advice = advise(small)
    assert "--short-side 96" in advice.change
    assert advice.gain == pytest.approx(5400 / 1200)
    assert "5.0 times smaller" in advice.why


def test_decoding_far_more_than_is_kept_asks_for_copies() -> None:
    advice = advise(replace(STARVED, cores=2, shrunk_side=96, shrunk_per_cpu_s=4200, shrunk_bytes=5_000))
    assert advice.bottleneck == "decoding"
    assert advice.change.startswith("python ingest.py shrink ")
    assert advice.gain == pytest.approx(2.0)
    assert "decoding takes 80%" in advice.why


def test_where_captions_cost_most_copies_are_no_advice() -> None:
    cheap = {"decode": 100, "captions": 300}
    advice = advise(replace(STARVED, cores=2, stages_us=cheap, shrunk_side=96, shrunk_per_cpu_s=4200))
    assert "shrink" not in advice.change
    assert "captions" in advice.bottleneck


def test_a_faster_decoder_is_named() -> None:
    advice = advise(replace(STARVED, cores=2, decoder="dali", other_decoder="turbo", other_loader_rate=4200))
    assert advice.change == "--decoder turbo"
    assert advice.gain == pytest.approx(2.0)
    slower = replace(STARVED, cores=2, other_decoder="dali", other_loader_rate=2200)
    assert "--decoder" not in advise(slower).change


def test_a_small_batch_is_found_to_be_bound_by_launches() -> None:
    small = replace(HEALTHY, batch_size=128, probed_batch=128, doubled_step_rate=7500)
    assert advise(small).change.startswith("--batch-size 256 ")
    assert advise(small).gain == pytest.approx(7500 / 5400)
    parts = replace(small, batch_size=1024, accumulate=8)
    assert advise(parts).change == "--accumulate 4"
    # At a part of the batch, twice that part says nothing of the batch.
    assert "batch" not in advise(replace(small, batch_size=4096)).change


def test_what_would_end_the_run_comes_first() -> None:
    full = replace(STARVED, memory_needed_gib=200)
    assert advise(full).change.startswith("--accumulate 4 ")
    bad = advise(replace(STARVED, bad_share=0.03))
    assert bad.bottleneck == "bad samples"
    assert "3.0%" in bad.why


def test_float32_and_no_compilation_are_advised_without_a_figure() -> None:
    plain = replace(HEALTHY, precision="fp32", compiled=False)
    assert (advise(plain).change, advise(plain).gain) == ("--precision bf16", None)
    assert advise(replace(plain, precision="bf16")).change == "--compile"


def test_uneven_batches_ask_for_more_ahead() -> None:
    advice = advise(replace(HEALTHY, joint_rate=3500, data_wait_fraction=0.3))
    assert advice.change == "--prefetch 6"
    assert advice.gain == pytest.approx(5400 / 3500)


def test_on_a_cpu_loader_and_model_share_the_cores() -> None:
    laptop = replace(
        HEALTHY, device="cpu", cores=2, threads=1, precision="fp32", loader_rate=900, loader_per_cpu_s=1000,
        step_rate=1600, step_per_cpu_s=800, joint_rate=800, data_wait_fraction=0.05, memory_needed_gib=None,
    )  # fmt: skip
    shared = 2 / (1 / 1000 + 1 / 800)
    assert laptop.attainable(2000, 1000) == pytest.approx(shared)
    # Nothing waits, so that cheaper images alone can help.
    advice = advise(replace(laptop, shrunk_side=96, shrunk_per_cpu_s=3000))
    assert "shrink" in advice.change
    assert advice.gain == pytest.approx(2 / (1 / 3000 + 1 / 800) / shared)
    # A thread more helps while cores are idle.
    idle = replace(laptop, cores=8, data_wait_fraction=0.4)
    assert advise(idle).change == "--threads 2"


def test_no_advice_promises_a_loss() -> None:
    """Over a grid of machines: what is advised for its gain gains, and every rule answers."""
    for device in ("cpu", "cuda"):
        for loader in (10.0, 1000.0, 50_000.0):
            for step in (5.0, 3000.0, 80_000.0):
                for threads in (1, 4):
                    machine = replace(
                        HEALTHY, device=device, loader_rate=loader * threads, loader_per_cpu_s=loader, step_rate=step,
                        threads=threads, joint_rate=0.9 * min(loader * threads, step),
                        data_wait_fraction=0.9 if loader * threads < step else 0.0, shrunk_side=96,
                        shrunk_per_cpu_s=2 * loader, shrunk_bytes=5e3, other_decoder="dali",
                        other_loader_rate=1.5 * loader * threads,
                    )  # fmt: skip
                    advice = advise(machine)
                    assert advice.gain is None or advice.gain > 1
                    assert advice.change
                    assert all(rule(machine) is None or rule(machine) for rule in RULES)


@pytest.fixture
def config(shards: Path) -> Config:
    torch.set_num_threads(1)  # at these sizes as fast
    flags = ["--data", str(shards), "--model", "ViT-Ti-16", "--tokens", "4", "--batch-size", "32", "--device", "cpu"]
    (config,) = parse(["--steps", "10", *flags], "")
    return resolved(config, cuda=False)


def test_the_probes_measure_what_there_is(config: Config, shards: Path) -> None:
    readings, notes = doctor.probe(config, 0.5)
    index = open_index([shards])
    sizes = [index.rows(shard).image_bytes for shard in range(len(index.shards))]
    assert min(map(min, sizes)) <= readings.image_bytes <= max(map(max, sizes))
    assert 96 <= readings.short_side <= 112  # as conftest draws them
    assert (readings.batch_size, readings.probed_batch, readings.image_size) == (32, 32, 32)
    assert readings.shrunk_side == 64
    assert readings.bad_share == readings.rejected_share == 0
    rates = (
        readings.loader_rate,
        readings.loader_per_cpu_s,
        readings.step_rate,
        readings.joint_rate,
        readings.storage_mb_per_s or 0,
        readings.shrunk_per_cpu_s or 0,
    )
    assert min(rates) > 0
    assert sum(readings.stages_us.values()) <= 1.2e6 / readings.loader_per_cpu_s
    text = doctor.report(readings, notes, advise(readings))
    assert re.search(r"\nbottleneck +\S.*\nchange +\S.*\nbecause +\S", text)


def test_bad_samples_are_named(config: Config, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage behind the index's back is found by the probes."""
    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    index = open_index([copy], progress=False)
    rows = index.rows(4)
    path = Path(index.shards[4].path)
    before = path.stat()
    with path.open("r+b") as file:
        for row in rows.usable[:40]:
            file.seek(int(rows.image_offset[row]))
            file.write(bytes(int(rows.image_bytes[row])))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    monkeypatch.setattr(doctor, "_import_seconds", lambda: 0.0)  # seconds of a fresh process, and nothing of samples
    readings, notes = doctor.probe(replace(config, data=(str(copy),)), 0.2)
    assert readings.bad_share > 0.05
    assert any(note.startswith("bad: ") and str(path) in note for note in notes)
    assert advise(readings).urgent


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for flags in (["--data", str(tmp_path / "none")], ["--tokens", "17"], ["--model", "ViT-Q-16"]):
        assert doctor.main([*flags, "--device", "cpu"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_the_page_names_only_flags_that_exist() -> None:
    """docs/doctor.md speaks of train.py's flags, and of a few of other commands."""
    text = (Path(__file__).parents[1] / "docs" / "doctor.md").read_text()
    known = {"--" + field.name.replace("_", "-") for field in fields(Config)}
    others = {"--doctor", "--short-side", "--parts", "--profile"}
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known | others
