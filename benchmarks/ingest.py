"""What ingestion costs: `python -m benchmarks.ingest`.

Rows: a synthetic table of metadata is selected from in a process of its own, with a filter and without; rows a second
of CPU time, and its peak memory. Pictures: a server on loopback (a process too), img2dataset alone on a list, and
this project's way on the same list, in turns: the download part by itself, then all with the checks. A ratio is of
the medians; the machine's other load falls on all of them alike.
"""

import asyncio
import io
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro
from PIL import Image

from pipeline.ingest import img2dataset, web
from pipeline.ingest.environment import python
from pipeline.ingest.select import select
from pipeline.ingest.web_recipe import WebRecipe
from pipeline.ingest.work_lists import list_path

from .command import write_json
from .environment import environment
from .peak import peak_bytes

_GROUP_ROWS = 1 << 20
_COLUMNS = {"url": ("URL",), "caption": ("TEXT",), "width": ("WIDTH",), "height": ("HEIGHT",)}


@dataclass(frozen=True)
class Ingest:
    """Time row selection, and downloads from a server on this machine."""

    rows: int = 50_000_000
    """Of the synthetic metadata; 0 to leave them out."""
    filter: str = "similarity >= 0.28 and punsafe < 0.5 and max(width, height) <= 3 * min(width, height)"
    """What the rows must pass; about 40 % do."""
    pictures: int = 6000
    """Rows of the list to download; 0 to leave them out."""
    list_rows: int = 1000
    """Of a work list, and of a shard of img2dataset alone."""
    rounds: int = 3
    processes: int = 2
    threads: int = 32
    json: Path | None = None
    """Write the figures here."""


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        asyncio.run(_serve())
        return
    if sys.argv[1:2] == ["--select"]:
        _select_once(Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
        return
    config = tyro.cli(Ingest, description=__doc__)
    result: dict[str, Any] = {"benchmark": "ingest", "environment": environment(), "rows": []}
    result["about"] = {**asdict(config), "json": None}
    with tempfile.TemporaryDirectory(dir=Path.cwd() / "data" if Path("data").is_dir() else None) as folder:
        if config.rows:
            result["rows"] += _rows(config, Path(folder))
        if config.pictures:
            rows, result["ratios"] = _pictures(config, Path(folder))
            result["rows"] += rows
    write_json(config.json, result)


# Rows


def _rows(config: Ingest, folder: Path) -> list[dict[str, Any]]:
    path = folder / "metadata.parquet"
    _write_metadata(path, config.rows)
    made: list[dict[str, Any]] = []
    for kind, condition in (("filtered", config.filter), ("all", "")):
        out = folder / "lists"
        out.mkdir()
        command = [sys.executable, "-m", "benchmarks.ingest", "--select", str(path), condition, str(out)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        shutil.rmtree(out)
        made.append({"contender": f"ours, row selection, {kind}", **json.loads(done.stdout)})
        print(json.dumps(made[-1]))
    path.unlink()
    return made


def _select_once(path: Path, condition: str, out: Path) -> None:
    recipe = WebRecipe(metadata="synthetic", license="none", columns=_COLUMNS, filter=condition)
    wall, cpu = time.monotonic(), time.process_time()
    plan = select(recipe, [path], out)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    peak = peak_bytes() / 2**20
    figures = {"rows": plan.rows_read, "selected": plan.rows, "rows_per_cpu_s": round(plan.rows_read / cpu)}
    print(json.dumps(figures | {"rows_per_s": round(plan.rows_read / wall), "peak_mib": round(peak)}))


def _write_metadata(path: Path, rows: int) -> None:
    """URLs of about 75 bytes and captions of about 55, all different, and scores."""
    rng = np.random.default_rng(0)
    words = np.array(["a", "photo", "of", "the", "red", "green", "house", "dog", "with", "vintage", "shirt", "cover"])
    texts = [" ".join(words[rng.integers(0, len(words), 9)]) for _ in range(4096)]
    writer: pq.ParquetWriter | None = None
    for start in range(0, rows, _GROUP_ROWS):
        numbers = range(start, min(start + _GROUP_ROWS, rows))
        salts = rng.integers(0, 1 << 62, len(numbers)).tolist()
        sides = rng.integers(50, 2000, (2, len(numbers)))
        table = pa.table(
            {
                "URL": [f"https://images.example.com/{salt:x}/{i}_large.jpg?v=2" for salt, i in zip(salts, numbers)],  # noqa: B905
                "TEXT": [f"{texts[salt & 4095]} {i}" for salt, i in zip(salts, numbers)],  # noqa: B905
                "WIDTH": sides[0],
                "HEIGHT": sides[1],
                "similarity": rng.uniform(0.25, 0.4, len(numbers)),
                "punsafe": rng.random(len(numbers)) ** 2,
            }
        )
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


# Pictures


class _Server(asyncio.Protocol):
    """Answers every request with one of a few photographs' worth of bytes."""

    answers: list[bytes]

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        digits = data[:64].split(b" ")[1].rpartition(b"/")[2].partition(b".")[0]
        self._transport.write(self.answers[int(digits) % len(self.answers)])
        self._transport.close()


async def _serve() -> None:
    rng = np.random.default_rng(0)
    for_each: list[bytes] = []
    for _ in range(32):
        soft = Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).resize((800, 600), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (600, 800, 1))
        stream = io.BytesIO()
        Image.fromarray((np.asarray(soft) + grain).clip(0, 255).astype(np.uint8)).save(stream, "jpeg", quality=85)
        head = f"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: {stream.tell()}\r\nConnection: close"
        for_each.append(f"{head}\r\n\r\n".encode() + stream.getvalue())
    _Server.answers = for_each
    server = await asyncio.get_running_loop().create_server(_Server, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    # Until whoever started it closes the pipe.
    await asyncio.to_thread(sys.stdin.read)


def _pictures(config: Ingest, folder: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Returns a row for each way to download, and ratios of their medians."""
    command = [sys.executable, "-m", "benchmarks.ingest", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        base = f"http://127.0.0.1:{int(server.stdout.readline())}"
        table = {
            "url": [f"{base}/{i}.jpg" for i in range(config.pictures)],
            "caption": [f"picture {i}" for i in range(config.pictures)],
        }
        pq.write_table(pa.table(table), folder / "pictures.parquet")
        ways: dict[str, Callable[[Path], None]] = {
            "img2dataset, 256 px": lambda out: _alone(config, folder, out, "keep_ratio"),
            "img2dataset, bytes only": lambda out: _alone(config, folder, out, "bytes"),
            "ours, download part": lambda out: _download(config, folder, out),
            "ours, with all checks, 256 px": lambda out: _whole(config, folder, out),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(config.rounds):
            for way, (name, run) in enumerate(ways.items()):
                out = folder / f"{number}-{way}"
                began = time.monotonic()
                run(out)
                seconds[name].append(time.monotonic() - began)
        assert server.stdin is not None
        server.stdin.close()
    rates = {name: config.pictures / statistics.median(times) for name, times in seconds.items()}
    ratios = {
        f"{ours} / {alone}": round(rates[ours] / rates[alone], 3)
        for ours in list(ways)[2:] for alone in list(ways)[:2]
    }  # fmt: skip
    for name, value in {**rates, **ratios}.items():
        print(f"{name:70s} {value:9.3f}")
    rows: list[dict[str, Any]] = []
    for name, times in seconds.items():
        low, high = config.pictures / max(times), config.pictures / min(times)
        rows.append({"contender": name, "images_per_s": rates[name], "images_per_s_range": [low, high]})
    return rows, ratios


def _settings(config: Ingest) -> img2dataset.Settings:
    return img2dataset.Settings(
        processes=config.processes, threads=config.threads, per_host=1000, allow_loopback=True
    )  # fmt: skip


def _alone(config: Ingest, folder: Path, out: Path, mode: str) -> None:
    """img2dataset as its own documentation runs it; or storing what came, as we let it."""
    resize = ["--resize_mode=no", "--disable_all_reencoding=True"] if mode == "bytes" else [
        "--resize_mode=keep_ratio", "--image_size=256", "--resize_only_if_bigger=True"]  # fmt: skip
    command = [
        str(python()), "-m", "img2dataset.main", f"--url_list={folder / 'pictures.parquet'}", "--input_format=parquet",
        "--url_col=url", "--caption_col=caption", "--output_format=webdataset", f"--output_folder={out}",
        f"--number_sample_per_shard={config.list_rows}", f"--processes_count={config.processes}",
        f"--thread_count={config.threads}", "--enable_wandb=False", *resize,
    ]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True)
    done = [json.loads(path.read_text())["successes"] for path in out.glob("*_stats.json")]
    assert sum(done) == config.pictures, done


def _recipe(config: Ingest) -> WebRecipe:
    return WebRecipe(metadata="synthetic", license="none", samples_per_shard=config.list_rows)


def _download(config: Ingest, folder: Path, out: Path) -> None:
    lists = out / "lists"
    lists.mkdir(parents=True)
    recipe = _recipe(config)
    plan = select(recipe, [folder / "pictures.parquet"], lists)
    paths = [list_path(lists, list_id) for list_id in plan.lists]
    settings = _settings(config)
    with (
        img2dataset.Proxy(settings, out / "proxy.jsonl") as proxy,
        img2dataset.Download(
            python(), paths, out / "staging", settings, recipe.opt_out, proxy, out / "log"
        ) as download,
    ):
        while not download.all_finished:
            assert not download.ended
            download.finished()
            download.idle_s()
            time.sleep(0.1)


def _whole(config: Ingest, folder: Path, out: Path) -> None:
    options = web.Options((folder / "pictures.parquet",), workers=config.processes, download=_settings(config))
    summary = web.make(_recipe(config), out, options)
    assert summary.fates == {"success": config.pictures}, summary.fates


if __name__ == "__main__":
    main()
