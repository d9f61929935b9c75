"""Checkpoints: what is written is what is read, by any number of ranks; a fault never costs the one before it."""

import itertools
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training import checkpoint, checkpoint_writer
from training.checkpoint_shards import Piece
from training.checkpoint_writer import CheckpointWriter

ROOT = Path(__file__).parents[1]
DTYPES = (torch.float32, torch.bfloat16, torch.int64)
Boxes = list[tuple[tuple[int, ...], tuple[int, ...]]]


def boxes(shape: tuple[int, ...], mesh: tuple[int, ...], dims: tuple[int, ...]) -> Boxes:
    """Offset and shape of each rank's box, cut as torch cuts: along each dimension of the mesh, in whole ceilings."""
    found: Boxes = []
    for coordinate in itertools.product(*map(range, mesh)):
        offset, size = [0] * len(shape), list(shape)
        for place, parts, dim in zip(coordinate, mesh, dims, strict=True):
            each = -(-size[dim] // parts)
            start = min(place * each, size[dim])
            offset[dim], size[dim] = offset[dim] + start, min(each, size[dim] - start)
        found.append((tuple(offset), tuple(size)))
    return found


def piece(tensor: torch.Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Piece:
    cut = tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))
    return Piece(tuple(tensor.shape), offset, tensor[cut])


def save_in_ranks(run: Path, step: int, per_rank: Sequence[Mapping[str, torch.Tensor | Piece]], keep: int = 2) -> None:
    """What that many processes would do; a writer of each rank, all in this one."""
    writers = [
        CheckpointWriter(run, keep=keep, rank=rank, world_size=len(per_rank), nonce=f"n{step}")
        for rank in range(len(per_rank))
    ]
    for writer, tensors in zip(writers, per_rank, strict=True):
        writer.save(step, tensors, {}, {"samples_seen": step * 10})
    for writer in writers:
        writer.close()


def save_two_ranks(run: Path, step: int, length: int = 40) -> torch.Tensor:
    """Saves `w`, filled by its step, as two ranks would. Returns it whole."""
    whole = torch.full((length, 3), float(step))
    halves = boxes((length, 3), (2,), (0,))
    save_in_ranks(run, step, [{"w": piece(whole, *half)} for half in halves])
    return whole


def save(run: Path, step: int, tensors: Mapping[str, torch.Tensor], keep: int = 2, milestone_every: int = 0) -> None:
    with CheckpointWriter(run, keep=keep, milestone_every=milestone_every) as writer:
        writer.save(step, tensors, {name + ".exp_avg": tensor for name, tensor in tensors.items()}, {"a": [step]})


def names(run: Path) -> list[str]:
    """Everything in the checkpoints' folder, litter too."""
    return sorted(path.name for path in (run / checkpoint.FOLDER).iterdir())


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype
        and one[name].shape == other[name].shape
        and one[name].numpy(force=True).tobytes() == other[name].numpy(force=True).tobytes()
        if one[name].dtype != torch.bfloat16
        else torch.equal(one[name].view(torch.int16), other[name].view(torch.int16))
        for name in one
    )


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    found: dict[str, torch.Tensor] = {}
    for i in range(draw(st.integers(1, 4))):
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        tensor = (1000 * torch.randn(shape, generator=generator)).to(dtype)
        # Not every tensor lies as its shape reads.
        found[f"layer.{i}.weight"] = tensor.T if tensor.ndim == 2 and draw(st.booleans()) else tensor
    return found


def meshes(world_size: int) -> list[tuple[int, ...]]:
    return [(world_size,), (2, world_size // 2)] if world_size % 2 == 0 else [(world_size,)]


@settings(max_examples=40)
@given(tensors(), st.data())
def test_any_ranks_write_and_any_ranks_read(found: dict[str, torch.Tensor], data: st.DataObject) -> None:
    writing, reading = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    per_rank: list[dict[str, torch.Tensor | Piece]] = [{} for _ in range(writing)]
    for name, tensor in found.items():
        mesh = data.draw(st.sampled_from(meshes(writing)))
        if tensor.ndim == 0 or data.draw(st.booleans()):
            for tensors_of_rank in per_rank:
                tensors_of_rank[name] = tensor
            continue
        dims = tuple(data.draw(st.integers(0, tensor.ndim - 1)) for _ in mesh)
        for tensors_of_rank, box in zip(per_rank, boxes(tuple(tensor.shape), mesh, dims), strict=True):
            tensors_of_rank[name] = piece(tensor, *box)
    with tempfile.TemporaryDirectory() as folder:
        save_in_ranks(Path(folder), 7, per_rank)
        last, passed_over = checkpoint.newest(Path(folder))
        assert last is not None
        assert passed_over == []
        assert last.state == {"step": 7, "samples_seen": 70}
        assert same(last.model_tensors(), found)
        with last.stored("model") as stored:
            for name, tensor in found.items():
                if tensor.ndim == 0:
                    continue
                mesh = data.draw(st.sampled_from(meshes(reading)))
                dims = tuple(data.draw(st.integers(0, tensor.ndim - 1)) for _ in mesh)
                for offset, size in boxes(tuple(tensor.shape), mesh, dims):
                    box = piece(tensor, offset, size).local
                    assert same({name: stored.read(name, offset, size)}, {name: box})
        assert names(Path(folder)) == ["step-00000007"]


def test_one_process_and_copies_give_one_file(tmp_path: Path) -> None:
    weights = {"w": torch.randn(3, 4), "step": torch.tensor(3)}
    save_in_ranks(tmp_path / "one", 1, [weights])
    save_in_ranks(tmp_path / "three", 1, [weights, weights, weights])
    for run in (tmp_path / "one", tmp_path / "three"):
        (folder,) = checkpoint.list_steps(run)
        files = {"manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"}
        assert {path.name for path in folder.iterdir()} == files
        assert same(checkpoint.at(folder).model_tensors(), weights)


def test_a_rank_writes_its_own_boxes_only(tmp_path: Path) -> None:
    whole = save_two_ranks(tmp_path, 1, length=5)
    (folder,) = checkpoint.list_steps(tmp_path)
    assert {path.name for path in folder.glob("*.safetensors")} == {
        "model-00000-of-00002.safetensors", "model-00001-of-00002.safetensors", "optimizer.safetensors",
    }  # fmt: skip
    layout = json.loads((folder / "layout.json").read_text())
    assert layout["model"]["w"]["shape"] == [5, 3]
    assert sorted(layout["model"]["w"]["pieces"]) == [
        ["model-00000-of-00002.safetensors", [0, 0]],
        ["model-00001-of-00002.safetensors", [3, 0]],
    ]
    assert torch.equal(checkpoint.at(folder).model_tensors()["w"], whole)


def test_other_groups_go_along(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path, keep=1) as writer:
        writer.save(1, {"w": torch.ones(2)}, {}, {}, ema={"w": torch.zeros(2)})
    last, _ = checkpoint.newest(tmp_path)
    assert last is not None
    assert same(last.tensors("ema"), {"w": torch.zeros(2)})
    assert last.tensors("other") == {}


def test_what_changes_after_save_is_not_in_it(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.randn(300_000) for i in range(4)}
    with CheckpointWriter(tmp_path, keep=5) as writer:
        for step in (1, 2, 3):
            before = {name: tensor.clone() for name, tensor in weights.items()}
            state = {"known_bad": {"7": "cut"}}
            writer.save(step, weights, {}, state)
            state["known_bad"]["8"] = "late"
            for tensor in weights.values():
                tensor.normal_()
            writer.close()
            last, _ = checkpoint.newest(tmp_path)
            assert last is not None
            assert same(last.model_tensors(), before)
            assert last.state["known_bad"] == {"7": "cut"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_changes_on_a_gpu_after_save_is_not_in_it(tmp_path: Path) -> None:
    weights = {f"w{i}": torch.randn(30_000_000, device="cuda") for i in range(4)}
    with CheckpointWriter(tmp_path, keep=5) as writer:
        for step in (1, 2):
            before = {name: tensor.to("cpu", copy=True) for name, tensor in weights.items()}
            writer.save(step, weights, {}, {})
            for tensor in weights.values():
                tensor.normal_()
            writer.close()
            last, _ = checkpoint.newest(tmp_path)
            assert last is not None
            assert same(last.model_tensors(), before)


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    first, second = (
        CheckpointWriter(tmp_path, keep=5, rank=rank, world_size=2, nonce="n", patience_s=60) for rank in (0, 1)
    )
    whole = torch.ones(4)
    halves = [piece(whole, (0,), (2,)), piece(whole, (2,), (2,))]
    first.save(1, {"w": halves[0]}, {}, {})
    assert checkpoint.list_steps(tmp_path) == []
    waited = first.waited_s
    late = threading.Timer(1.0, second.save, (1, {"w": halves[1]}, {}, {}))
    late.start()
    first.save(2, {"w": halves[0]}, {}, {})
    assert [path.name for path in checkpoint.list_steps(tmp_path)] == ["step-00000001"]
    assert first.waited_s - waited > 0.1
    late.join()
    second.save(2, {"w": halves[1]}, {}, {})
    second.close()
    first.close()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_newest_and_the_milestones_stay(tmp_path: Path) -> None:
    for step in range(1, 12):
        save(tmp_path, step, {"w": torch.full((2,), float(step))}, keep=2, milestone_every=4)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (4, 8, 10, 11)]
    save(tmp_path, 12, {"w": torch.ones(2)}, keep=1)
    assert names(tmp_path) == ["step-00000012"]


def test_the_same_step_again_replaces_it(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save(tmp_path, 3, {"w": torch.full((2,), value)}, keep=1)
    assert names(tmp_path) == ["step-00000003"]
    last, _ = checkpoint.newest(tmp_path)
    assert last is not None
    assert same(last.model_tensors(), {"w": torch.full((2,), 2.0)})


def damage(folder: Path, how: str) -> str:
    """Damages a two-rank checkpoint. Returns what the phrase must say."""
    file = folder / "model-00001-of-00002.safetensors"
    match how:
        case "truncated":
            file.write_bytes(file.read_bytes()[:-7])
            return "model-00001-of-00002.safetensors, of rank 1, is damaged ("
        case "bit":
            content = bytearray(file.read_bytes())
            content[-3] ^= 4
            file.write_bytes(content)
            return "model-00001-of-00002.safetensors is damaged (its checksum differs)"
        case "rank":
            file.unlink()
            return "model-00001-of-00002.safetensors, of rank 1, is missing"
        case "layout":
            (folder / "layout.json").unlink()
            return "layout.json is missing"
        case "no manifest":
            (folder / "manifest.json").unlink()
            return "manifest.json is missing"
        case "elsewhere":
            manifest = json.loads((folder / "manifest.json").read_text())
            (folder / "manifest.json").write_text(json.dumps({**manifest, "/dev/zero": {"bytes": 0, "sha256": ""}}))
            return "manifest.json is damaged (it names files elsewhere)"
        case _:
            (folder / "manifest.json").write_text('{"model-00001-of-00002.safetensors": 3')
            return "manifest.json is damaged"


@pytest.mark.parametrize("how", ["truncated", "bit", "rank", "layout", "no manifest", "manifest", "elsewhere"])
def test_a_damaged_one_is_passed_over_and_named(tmp_path: Path, how: str) -> None:
    whole = save_two_ranks(tmp_path, 5)
    save_two_ranks(tmp_path, 6)
    folder = checkpoint.list_steps(tmp_path)[-1]
    phrase = damage(folder, how)
    last, passed_over = checkpoint.newest(tmp_path)
    assert last is not None
    assert last.state["step"] == 5
    assert torch.equal(last.model_tensors()["w"], whole)
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"{folder}: {phrase}")
    # The run goes on from 5 with little room: the damaged 6 must not push it out before there is another.
    save(tmp_path, 5, {"w": torch.ones(1)}, keep=1)
    assert names(tmp_path) == ["step-00000005"]


def test_any_one_bit_is_found_or_changes_nothing(tmp_path: Path) -> None:
    whole = save_two_ranks(tmp_path, 5)
    (folder,) = checkpoint.list_steps(tmp_path)
    files = sorted(folder.iterdir())

    @settings(max_examples=150)
    @given(st.sampled_from(files), st.integers(0, 10**6), st.integers(0, 7))
    def flip(path: Path, at: int, bit: int) -> None:
        good = path.read_bytes()
        bad = bytearray(good)
        bad[at % len(bad)] ^= 1 << bit
        path.write_bytes(bad)
        try:
            last, passed_over = checkpoint.newest(tmp_path)
            if last is None:
                assert len(passed_over) == 1
            else:
                # A space in the manifest.
                assert path.name == "manifest.json"
                assert torch.equal(last.model_tensors()["w"], whole)
        finally:
            path.write_bytes(good)

    flip()


@pytest.fixture(params=["tmpfs", "limit"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder in which 300 kB fit and 3 MB do not."""
    if request.param == "tmpfs":
        disk = tmp_path / "disk"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a small disk can be mounted by root only; the limit on file sizes stands in for it")
        yield disk
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
        return
    # Python ignores the signal, so that a write past the limit fails as on a full disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        yield tmp_path
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_line_and_costs_nothing_older(small_disk: Path) -> None:
    run = small_disk / "run"
    small, large = {"w": torch.randn(30_000)}, {"w": torch.randn(750_000)}
    writer = CheckpointWriter(run, keep=1)
    writer.save(1, small, {}, {})
    writer.save(2, large, {}, {})
    with pytest.raises(OSError, match=r"step-00000002 cannot be written .* the older checkpoints are untouched") as met:
        writer.close()
    assert "\n" not in str(met.value)
    assert names(run) == ["step-00000001"]
    last, passed_over = checkpoint.newest(run)
    assert last is not None
    assert passed_over == []
    assert same(last.model_tensors(), small)
    # Raised once; with room again the same writer goes on.
    writer.save(3, small, {}, {})
    writer.close()
    assert names(run) == ["step-00000003"]


def test_the_next_call_raises_what_the_thread_met(small_disk: Path) -> None:
    for call in ("save", "check", "with"):
        writer = CheckpointWriter(small_disk / call, keep=1)
        writer.save(1, {"w": torch.randn(750_000)}, {}, {})
        with pytest.raises(OSError, match="step-00000001 cannot be written"):  # noqa: PT012
            if call == "save":
                writer.save(2, {"w": torch.ones(1)}, {}, {})
            elif call == "check":
                while True:
                    writer.check()
            else:
                with writer:
                    pass
        assert names(small_disk / call) == []


def test_a_full_disk_of_one_rank_is_told_to_rank_0(small_disk: Path) -> None:
    run = small_disk / "run"
    whole = torch.randn(800_000)
    writers = [CheckpointWriter(run, keep=1, rank=rank, world_size=2, nonce="n") for rank in (0, 1)]
    writers[0].save(1, {"w": piece(whole, (0,), (2,))}, {}, {})
    # The other fills the disk until it gives up; this one is to have written its little before.
    deadline = time.monotonic() + 60
    while not any(path.stat().st_size for path in run.rglob("optimizer.safetensors")):
        assert time.monotonic() < deadline, "rank 0 wrote nothing"
        time.sleep(0.001)
    writers[1].save(1, {"w": piece(whole, (2,), (799_998,))}, {}, {})
    for writer, who in zip(reversed(writers), ("", "rank 1 of 2: "), strict=True):
        with pytest.raises(OSError, match=rf"step-00000001 cannot be written \({who}[^r]"):
            writer.close()
    assert names(run) == []


def test_a_rank_that_is_gone_is_named(tmp_path: Path) -> None:
    whole = save_two_ranks(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, keep=1, rank=0, world_size=3, nonce="n", patience_s=0.1)
    writer.save(2, {"w": piece(whole, (0, 0), (20, 3))}, {}, {})
    with pytest.raises(OSError, match=r"no part came from ranks 1, 2 of 3 within 0\.1 s"):
        writer.close()
    assert names(tmp_path) == ["step-00000001"]


def test_only_rank_0_begins_a_save(tmp_path: Path) -> None:
    """Another rank that comes when rank 0 has given up, as on a full disk, begins it no second time."""
    late = CheckpointWriter(tmp_path, keep=1, rank=1, world_size=2, nonce="n", patience_s=0.1)
    late.save(1, {"w": piece(torch.ones(4), (2,), (2,))}, {}, {})
    with pytest.raises(OSError, match=r"step-00000001 cannot be written \(rank 0 of 2 did not begin it within 0\.1 s"):
        late.close()
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_no_part_of_this_one(tmp_path: Path) -> None:
    whole = torch.ones(4)
    killed = CheckpointWriter(tmp_path, keep=1, rank=1, world_size=2, nonce="before")
    # As far as its rank 0 had come.
    (tmp_path / checkpoint.FOLDER / f"step-00000002.before-1{checkpoint.PARTIAL}").mkdir(parents=True)
    killed.save(2, {"w": piece(whole, (2,), (2,))}, {}, {})
    killed.close()
    (left_over,) = (tmp_path / checkpoint.FOLDER).iterdir()
    assert (left_over / "part-00001.json").exists()
    assert checkpoint.newest(tmp_path) == (None, [])
    writer = CheckpointWriter(tmp_path, keep=1, rank=0, world_size=2, nonce="after", patience_s=0.1)
    writer.save(2, {"w": piece(whole, (0,), (2,))}, {}, {})
    with pytest.raises(OSError, match="no part came from rank 1 of 2"):
        writer.close()
    assert names(tmp_path) == []


def test_an_error_under_way_is_the_one_that_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writer, "_AFTER_ERROR_S", 0.1)
    writer = CheckpointWriter(tmp_path, keep=1, rank=0, world_size=2, nonce="n")
    with pytest.raises(ValueError, match="the loss"), writer:  # noqa: PT012
        writer.save(1, {"w": piece(torch.ones(4), (0,), (2,))}, {}, {})
        raise ValueError("the loss")
    assert names(tmp_path) == []
    with pytest.raises(ValueError, match="the loss"), CheckpointWriter(tmp_path, keep=1) as alone:  # noqa: PT012
        alone.save(1, {"w": torch.ones(4)}, {}, {})
        raise ValueError("the loss")
    assert names(tmp_path) == ["step-00000001"]


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from training import checkpoint
from training.checkpoint_shards import Piece
from training.checkpoint_writer import CheckpointWriter

torch.set_num_threads(1)
draw = random.Random(0)

def train(run, rank, world_size, start, nonce):
    writer = CheckpointWriter(run, keep=2, rank=rank, world_size=world_size, nonce=nonce)
    for step in range(start + 1, 10**6):
        local = torch.full((3000, 2), float(step))
        piece = Piece((3000 * world_size, 2), (3000 * rank, 0), local)
        writer.save(step, {f"w{i}": piece if world_size > 1 else local for i in range(6)}, {}, {"tag": step})
        local.zero_()

def newest_step(run):
    steps = checkpoint.list_steps(run)
    return checkpoint.step_of(steps[-1]) if steps else 0

def kill_all(run, world_size, kills):
    before, while_writing = 0, 0
    for kill in range(kills):
        ranks = []
        for rank in range(world_size):
            pid = os.fork()
            if not pid:
                train(run, rank, world_size, before, f"start{kill}")
            ranks.append(pid)
        while newest_step(run) == before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.06))
        seen = newest_step(run)
        for pid in draw.sample(ranks, world_size):
            os.kill(pid, signal.SIGKILL)
        for pid in ranks:
            assert os.waitpid(pid, 0)[1] == signal.SIGKILL, "a rank ended by itself"
        last, passed_over = checkpoint.newest(run)
        assert last is not None and passed_over == [], passed_over
        step = last.state["step"]
        assert step >= seen > before and last.state["tag"] == step
        tensors = last.model_tensors()
        assert len(tensors) == 6
        for tensor in tensors.values():
            assert tensor.shape == (3000 * world_size, 2) and bool((tensor == step).all()), tensor
        while_writing += any((run / "checkpoints").glob(f"*.start{kill}-*.partial"))
        before = step
    return while_writing

print(sum(kill_all(Path(sys.argv[1]) / f"run{n}", n, int(sys.argv[2])) for n in (1, 2)))
"""


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_9_leaves_a_whole_newest_one(tmp_path: Path, kills: int) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(kills)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= kills // 2, "too few of the kills met a save under way to say anything"
    for run in (tmp_path / "run1", tmp_path / "run2"):
        save(run, 10**6, {"w": torch.ones(1)}, keep=1)
        assert names(run) == ["step-01000000"]
