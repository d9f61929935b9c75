"""Batches from worker processes: the same as from threads, whatever becomes of the workers or of their parent."""

import contextlib
import functools
import http.server
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CrowdServer, eventually, process_stat
from test_loader import TENSORS, damage, new_loader, same

from pipeline.index import Index, open_index
from pipeline.loader import DecoderName, Loader, check_workers
from pipeline.mixture import make_order
from pipeline.processes import MAX_DEATHS, WorkerDied
from pipeline.read import ReadFailed
from pipeline.slabs import Field, Slab
from pipeline.store import Limits

linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="worker processes need Linux's memory files")
pytestmark = linux

FIELDS = {"one": Field(torch.int32, (3, 5)), "odd": Field(torch.uint8, (1, 3)), "other": Field(torch.bool, (7,))}


def workers_of(parent: int) -> list[int]:
    """The loader's worker processes of a process that have not ended."""
    found: list[int] = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal() and process_stat(int(folder.name))[1:2] == [str(parent)]:
            try:
                command = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if b"pipeline.loader_worker" in command:
                found.append(int(folder.name))
    return sorted(found)


def memory_files(processes: str = "[0-9]*") -> set[int]:
    """The inodes of all files in memory that processes hold open or have mapped."""
    found: set[int] = set()
    for descriptor in Path("/proc").glob(f"{processes}/fd/*"):
        try:
            if os.readlink(descriptor).startswith("/memfd:shortclip"):
                found.add(os.stat(descriptor).st_ino)
        except OSError:
            continue
    for maps in Path("/proc").glob(f"{processes}/maps"):
        try:
            found |= {int(line.split()[4]) for line in maps.read_text().splitlines() if "/memfd:shortclip" in line}
        except OSError:
            continue
    return found


def is_open(path: Path) -> bool:
    """Whether any process that we may look into holds a file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(descriptor) == str(path):
                return True
    return False


@pytest.fixture(scope="module")
def hurt(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The shards with two images that only a decoder finds bad."""
    folder = tmp_path_factory.mktemp("slabs") / "data"
    shutil.copytree(shards, folder)
    damage(folder, "00003.tar", "000000090")
    damage(folder, "00001.tar", "000000055")
    return folder


def test_a_slot_is_lent_while_any_view_of_it_lives_and_another_sees_what_is_written() -> None:
    slab = Slab(FIELDS, 3)
    other = Slab(FIELDS, 3, os.dup(slab.descriptor))
    for slot in range(3):
        for name, tensor in slab.tensors(slot).items():
            tensor.copy_(torch.full(tensor.shape, slot + 1).to(tensor.dtype))
            assert tensor.shape == FIELDS[name].shape
    for slot in range(3):
        for name, tensor in other.tensors(slot).items():
            assert torch.equal(tensor, torch.full(FIELDS[name].shape, slot + 1).to(tensor.dtype)), name
    assert slab.lent() == set()
    tensors = slab.tensors(1)
    view = tensors["other"].numpy()[2:4]
    del tensors
    assert slab.lent() == {1}
    del view
    assert slab.lent() == set()
    kept = slab.tensors(2)["one"]
    slab.close()
    other.close()
    del slab, other
    assert kept.unique().tolist() == [3]


@pytest.mark.parametrize(("workers", "decoder", "first"), [(1, "turbo", 9), (2, "dali", 5)])
def test_workers_change_nothing(hurt: Path, workers: int, decoder: DecoderName, first: int) -> None:
    threads, loader = new_loader(hurt, decoder=decoder), new_loader(hurt, decoder=decoder)
    expected = list(threads.batches(first, first + 14))
    found = list(loader.batches(first, first + 14, workers=workers, prefetch=first % 3))
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert same(one, other)
        assert (one.grid, one.rejected) == (other.grid, other.rejected)
        assert all(getattr(one, name).is_contiguous() for name in TENSORS)
    assert loader.known_bad == threads.known_bad
    assert set(loader.known_bad) == {55, 90}
    assert all(seconds > 0 for seconds in loader.stage_seconds.values())
    assert workers_of(os.getpid()) == []


def test_ranks_mixtures_and_known_bad_travel_to_workers(hurt: Path, shards: Path) -> None:
    index = open_index([hurt, shards])
    order = make_order(
        index.shard_sizes, index.source_shards, [0.7, 0.3], batch_size=32, seed=5, lanes=8, resampled=True
    )
    settings = new_loader(hurt).settings
    threads, loader = (Loader(index, order, settings, rank=1, world_size=2) for _ in range(2))
    # A reason that no decoder gives: it can only have been told.
    for each in (threads, loader):
        each.known_bad.update({90: "known before", 3: "known before"})
    expected = list(threads.batches(0, 30))
    assert {item.reason for batch in expected for item in batch.rejected} == {"known before", "JPEG cannot be decoded"}
    addresses: set[int] = set()
    for one, other in zip(loader.batches(0, 30, workers=1, prefetch=1), expected, strict=True):
        assert same(one, other)
        assert one.rejected == other.rejected
        addresses.add(one.patches.data_ptr())
    # Who takes one at a time gets no copies: of one worker, one ahead, one in hand and the one before.
    assert len(addresses) <= 4
    assert loader.known_bad == threads.known_bad


def test_what_the_consumer_holds_is_never_written_to(shards: Path) -> None:
    held: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    rng = np.random.default_rng(0)
    for batch in new_loader(shards).batches(0, 60, workers=1, prefetch=1):
        # Of some batches all is held, of some one tensor, of some a view.
        names = TENSORS if rng.random() < 0.3 else [str(rng.choice(TENSORS))]
        tensors = [getattr(batch, name)[1:] for name in names]
        held.append((tensors, [each.clone() for each in tensors]))
        del batch, tensors
        # Some dozen are held at a time, so that both shared slots and copies come by.
        for _ in range(min(int(rng.integers(0, 3)), max(len(held) - 12, 0))):
            tensors, copies = held.pop(int(rng.integers(len(held))))
            assert all(map(torch.equal, tensors, copies))
            del tensors
    assert len(held) > 10
    for tensors, copies in held:
        assert all(map(torch.equal, tensors, copies))


def test_leaving_early_ends_the_workers(shards: Path) -> None:
    batches = new_loader(shards).batches(0, 1000, workers=2)
    kept = next(batches)
    ids = kept.sample_ids.clone()
    assert len(workers_of(os.getpid())) == 2
    batches.close()
    assert workers_of(os.getpid()) == []
    assert torch.equal(kept.sample_ids, ids)
    # Before the first batch, while workers are still importing.

    def interrupt() -> None:
        eventually(lambda: len(workers_of(os.getpid())) == 1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # the signal comes at any time in here
            thread.start()
            next(new_loader(shards).batches(0, 1000, workers=1))
            time.sleep(240)
    finally:
        thread.join()
    assert workers_of(os.getpid()) == []


def test_a_killed_worker_is_replaced_and_signals_of_a_terminal_are_not_for_workers(
    hurt: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    threads, loader = new_loader(hurt), new_loader(hurt)
    expected = threads.batches(0, 40)
    killed: list[int] = []
    for step, (one, other) in enumerate(zip(loader.batches(0, 40, workers=2), expected, strict=True)):
        assert same(one, other), step
        if step == 2:
            for worker in workers_of(os.getpid()):
                os.kill(worker, signal.SIGINT)
                os.kill(worker, signal.SIGTERM)
        if step in (5, 20):
            killed.append(workers_of(os.getpid())[step % 2])
            os.kill(killed[-1], signal.SIGKILL)
    assert loader.known_bad == threads.known_bad
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2
    for number, (line, process) in enumerate(zip(lines, killed, strict=True), 1):
        assert f"of the loader (process {process}) was killed by SIGKILL" in line
        assert line.endswith(f"started again ({number} of {MAX_DEATHS})")
    assert workers_of(os.getpid()) == []


def test_workers_that_die_again_and_again_stop_the_run_in_one_line(shards: Path) -> None:
    killed: set[int] = set()
    stopped = threading.Event()

    def kill_all() -> None:
        while not stopped.is_set():
            for worker in workers_of(os.getpid()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(worker, signal.SIGKILL)
                    killed.add(worker)

    thread = threading.Thread(target=kill_all)
    thread.start()
    try:
        with pytest.raises(WorkerDied) as failed:
            next(new_loader(shards).batches(7, 1000, workers=1))
    finally:
        stopped.set()
        thread.join()
    assert len(killed) == MAX_DEATHS + 1
    text = str(failed.value)
    assert "\n" not in text
    assert "was killed by SIGKILL while it made step 7, the 4th such death within" in text
    assert text.endswith("then run the same command again")
    assert workers_of(os.getpid()) == []


def test_errors_cross_as_they_are_and_only_when_their_step_comes(tmp_path: Path, shards: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(shards, folder)
    loader = new_loader(folder)
    (folder / "00002.tar").unlink()  # a shard of one sample: most batches do without
    # The index keeps what threads have read; workers begin with theirs empty.
    fresh = Loader(loader.index, loader.order, loader.settings)
    by_threads, by_workers = [], []
    for made, batches in ((by_threads, fresh.batches(0, 14)), (by_workers, loader.batches(0, 14, workers=2))):
        with pytest.raises(ReadFailed, match=r"00002\.tar: cannot be read .*; bring it back") as failed:
            made.extend(batch.sample_ids.tolist() for batch in batches)
        made.append(str(failed.value))
    assert by_workers == by_threads
    assert len(by_workers) > 1
    assert workers_of(os.getpid()) == []


def test_a_worker_that_cannot_begin_says_why(tmp_path: Path, shards: Path) -> None:
    vocabulary = tmp_path / "vocab.txt"
    loader = new_loader(shards)
    loader.settings = replace(loader.settings, vocabulary=vocabulary)
    with pytest.raises(ValueError, match=r"vocab\.txt is no file, so the WordPiece vocabulary is missing"):
        next(loader.batches(0, 5, workers=1))
    assert workers_of(os.getpid()) == []


def test_what_cannot_be_made_by_workers_is_refused_at_once(shards: Path) -> None:
    loader = new_loader(shards)
    on_gpu = replace(loader.settings, decoder="dali", device_id=1)
    with pytest.raises(ValueError, match=r"--workers 2: --decoder dali decodes on GPU 1, .*--decoder turbo"):
        check_workers(on_gpu, 2)
    check_workers(on_gpu, 0)
    check_workers(replace(on_gpu, decoder="turbo"), 2)
    with pytest.raises(ValueError, match=r"--workers -1 is below 0"):
        loader.batches(0, 5, workers=-1)


class Silent(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path, shards: Path) -> Iterator[str]:
    """URL of the shards, on a web server."""
    folder = tmp_path / "served"
    shutil.copytree(shards, folder, ignore=shutil.ignore_patterns("*.parquet"))
    server = CrowdServer(("127.0.0.1", 0), functools.partial(Silent, directory=str(folder)))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("cache", ["large", pytest.param("small", marks=pytest.mark.slow)])
def test_workers_share_the_cache_of_remote_shards(
    served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    urls = served + "/{00000..00005}.tar"
    largest = max(path.stat().st_size for path in (tmp_path / "served").glob("*.tar"))
    # Small: one shard at a time, so each worker waits until the other is idle and lets go of it.
    limits = Limits(cache_bytes=1 << 30 if cache == "large" else largest, first_wait_s=0.01)

    def loader(index: Index) -> Loader:
        order = make_order(index.shard_sizes, index.source_shards, None, batch_size=32, seed=3, lanes=8)
        return Loader(index, order, new_loader(tmp_path / "served").settings)

    steps = 45 if cache == "large" else 4
    expected = loader(open_index([tmp_path / "served"])).batches(0, steps)
    found = loader(open_index([urls], limits=limits)).batches(0, steps, workers=2)
    assert all(same(one, other) for one, other in zip(found, expected, strict=True))
    assert {path.suffix for path in limits.cache_folder.iterdir()} == {".shard", ""}


RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import torch
from test_loader import new_loader
batches = new_loader(Path(sys.argv[1])).batches(int(sys.argv[2]), 10**9, workers=2)
for step, batch in enumerate(batches, int(sys.argv[2])):
    print(step, int(batch.patches.long().sum()), batch.sample_ids.tolist(), flush=True)
"""


def kill_and_resume(shards: Path, scratch: Path, kills: int) -> None:
    """Runs a consumer of batches again and again, each time from where it was killed, with its group or alone."""
    rng = np.random.default_rng(kills)
    environment = {**os.environ, "TMPDIR": str(scratch), "XDG_CACHE_HOME": str(scratch)}
    root = Path(__file__).parents[1]
    threads = new_loader(shards)
    listed = sorted(os.listdir("/dev/shm"))
    step = 0
    for number in range(kills):
        command = [sys.executable, "-c", RUN, str(shards), str(step), str(root), str(root / "tests")]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
            assert process.stdout is not None
            assert eventually(lambda process=process: len(workers_of(process.pid)) == 2)
            # Every third while its workers are still importing.
            for _ in range(int(rng.integers(1, 12)) if number % 3 else 0):
                expected = threads.batch(step)
                line = f"{step} {int(expected.patches.long().sum())} {expected.sample_ids.tolist()}\n"
                assert process.stdout.readline() == line
                step += 1
            workers, files = workers_of(process.pid), memory_files(str(process.pid))
            assert len(workers) == 2
            assert len(files) == 2  # the slab, and what workers make their loader of
            process.kill()
        assert eventually(lambda workers=workers: not any(map(process_stat, workers))), "workers outlive their parent"
        assert not files & memory_files()
    # Others on this machine may use it meanwhile, under names of their own or while they run.
    left = [name for name in set(os.listdir("/dev/shm")) - set(listed) if "shortclip" in name or "psm_" in name]
    assert not [name for name in left if not is_open(Path("/dev/shm") / name)]
    assert list(scratch.iterdir()) == []


def test_nothing_outlives_a_parent_that_was_killed(shards: Path, tmp_path: Path) -> None:
    kill_and_resume(shards, tmp_path, 2)


@pytest.mark.slow
def test_nothing_outlives_twenty_kills(shards: Path, tmp_path: Path) -> None:
    kill_and_resume(shards, tmp_path, 20)
