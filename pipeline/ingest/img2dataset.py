"""img2dataset as a process that is watched: work lists in, its shards out as each is finished.

It only fetches here: what it stores are the bytes that came, undecoded (`--disable_all_reencoding`), so no picture is
decoded before it is judged. All its requests go through the filtering proxy. Of its own options none retries: it would
ask for a 404 again.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq

from ..scan import MAX_PIXELS
from .environment import Distributor
from .proxy import environment as proxied
from .staged import Staged

GUARD = Path(__file__).with_name("guard.py")
USER_AGENT = "shortclip"
ROW_LIMIT = 10_000


@dataclass(frozen=True)
class Settings:
    """How to download. None of it changes which pairs a row could give."""

    distributor: Distributor = "multiprocessing"
    processes: int = 2
    threads: int = 64
    """A process; as many requests at once."""
    timeout_s: int = 10
    """Without a byte."""
    deadline_s: int = 60
    """For a whole picture."""
    max_bytes: int = 20_000_000
    """Of a picture's file."""
    per_host: int = 16
    """Requests to one host at once."""
    allow_loopback: bool = False
    """For people who serve their own files on this machine."""


class Proxy:
    """The filtering proxy as a process of its own, which ends with this one. A context manager."""

    def __init__(self, settings: Settings, log: Path) -> None:
        log = log.resolve()  # it runs in another folder
        command = [sys.executable, "-m", f"{__package__}.proxy", "--port", "0", "--log", str(log)]
        for flag, value in (
            ("max-bytes", settings.max_bytes),
            ("deadline", settings.deadline_s),
            ("timeout", settings.timeout_s),
            ("per-host", settings.per_host),
            ("connections", max(512, settings.processes * settings.threads + 16)),
        ):
            command += [f"--{flag}", str(value)]
        command += ["--allow-loopback"] if settings.allow_loopback else []
        package_root = Path(__file__).parents[2]
        earlier = _size(log)
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=package_root, start_new_session=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith("listening on 127.0.0.1:"):
            raise ValueError(f"the download proxy does not start ({line.strip() or 'it ended'})")
        self.port = int(line.rpartition(":")[2])
        self._log = log
        self._read = earlier
        self.cut: dict[str, str] = {}
        """URL -> why its answer was broken off under way, which the downloader cannot tell from a bad connection."""

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def read_log(self) -> int:
        """Takes in what was logged since; returns the log's bytes so far, which grow while anything fails."""
        with self._log.open("rb") as file:
            file.seek(self._read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            entry = json.loads(line)
            # The last line of a run has its totals.
            if (reason := entry.get("reason")) in _CUT_REASONS:
                self.cut[entry["url"]] = reason
        while len(self.cut) > _MAX_CUT:
            del self.cut[next(iter(self.cut))]
        return self._read

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


_CUT_REASONS = ("too slow", "too large")
_MAX_CUT = 20_000


class Download:
    """One img2dataset over some work lists. A context manager: at its end the whole process group is gone."""

    def __init__(self, python: Path, lists: Sequence[Path], folder: Path, settings: Settings, opt_out: Sequence[str],
                 proxy: Proxy, log: Path) -> None:  # fmt: skip
        folder = folder.resolve()  # in which it runs
        self.lists = list(lists)
        """img2dataset numbers its shards as these stand here."""
        self.shards = folder / "shards"
        self.staged = Staged(self.shards)
        """What has come and was not taken away, as of its last look."""
        self._finished: set[int] = set()
        inputs = folder / "lists"
        shutil.rmtree(folder, ignore_errors=True)
        inputs.mkdir(parents=True)
        for number, path in enumerate(self.lists):
            rows = pq.read_table(path, columns=["row", "url", "status"])
            wanted = rows.filter(rows["status"].is_null())
            asked = pa.table({"row": wanted["row"], "url": _quoted(wanted["url"])})
            pq.write_table(asked, inputs / f"{number:06d}.parquet", compression="none")
        self._log: IO[bytes] = log.open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(GUARD), *_command(python, inputs, self.shards, settings, opt_out)],
            stdin=subprocess.PIPE, stdout=self._log, stderr=self._log, start_new_session=True, cwd=folder,
            env=_variables(python, proxy.port) | _scratch(folder, settings.distributor),
        )  # fmt: skip
        self._proxy = proxy
        self._activity = 0
        self._idle_s = 0.0
        self._looked = time.monotonic()

    def finished(self) -> list[tuple[Path, Path]]:
        """Returns the lists that were finished since the last call, each with its shard without the suffix."""
        numbers = {int(path.name.partition("_")[0]) for path in self.shards.glob("*_stats.json")} - self._finished
        self._finished |= numbers
        return [(self.lists[number], self.shards / f"{number:05d}") for number in sorted(numbers)]

    @property
    def all_finished(self) -> bool:
        return len(self._finished) == len(self.lists)

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def idle_s(self) -> float:
        """Returns how long nothing came and nothing failed; while this process stood still itself does not count."""
        now = time.monotonic()
        self.staged.look()
        activity = self._proxy.read_log() + self.staged.tar_bytes
        self._idle_s = 0.0 if activity != self._activity else self._idle_s + min(now - self._looked, 1.0)
        self._activity, self._looked = activity, now
        return self._idle_s

    def __enter__(self) -> "Download":
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # the guard kills its group, if it is still there
        self._process.wait()
        kill_group(self._process.pid)
        self._log.close()


def kill_group(leader: int) -> None:
    """Kills what is left of a process group."""
    try:
        os.killpg(leader, 9)
    except ProcessLookupError:
        return


def _quoted(urls: Any) -> Any:
    """URLs as they can be sent: spaces and letters beyond ASCII in percent signs, as browsers write them."""
    texts: list[str] = urls.to_pylist()
    plain = re.compile(r"[!-~]*")
    return pa.array([url if plain.fullmatch(url) else quote(url, safe=_UNQUOTED) for url in texts], pa.string())


_UNQUOTED = "".join(chr(code) for code in range(33, 127))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # taken away meanwhile
        return 0


def _command(
    python: Path, inputs: Path, shards: Path, settings: Settings, opt_out: Sequence[str]
) -> list[str]:  # fmt: skip
    options: dict[str, Any] = {
        "url_list": inputs,
        "input_format": "parquet",
        "url_col": "url",
        "save_additional_columns": '["row"]',
        "output_format": "webdataset",
        "output_folder": shards,
        "number_sample_per_shard": ROW_LIMIT,
        "resize_mode": "no",
        "disable_all_reencoding": True,
        "extract_exif": False,
        "compute_hash": None,
        "enable_wandb": False,
        "distributor": settings.distributor,
        "processes_count": settings.processes,
        "thread_count": settings.threads,
        # The proxy's own comes first, and says what it was that took so long.
        "timeout": settings.timeout_s + 5,
        "retries": 0,
        "max_shard_retry": 0,
        "user_agent_token": USER_AGENT,
        "disallowed_header_directives": json.dumps(list(opt_out)),
    }
    return [str(python), "-m", "img2dataset.main", *(f"--{name}={value}" for name, value in options.items())]


def _scratch(folder: Path, distributor: Distributor) -> dict[str, str]:
    """Where a process that is killed leaves its temporary files: where they go with the rest.

    Not for the engines, whose sockets must have short names, and which are let end by themselves.
    """
    if distributor != "multiprocessing":
        return {}
    (folder / "tmp").mkdir()
    return {"TMPDIR": str(folder / "tmp")}


def _variables(python: Path, port: int) -> dict[str, str]:
    """The process's environment: everything through the proxy, and nothing from this project's own Python."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONWARNINGS")
    inherited = {name: value for name, value in os.environ.items() if name not in dropped}
    return inherited | proxied(port) | {
        "NO_ALBUMENTATIONS_UPDATE": "1",
        # Nothing is decoded there; should an option ever change that, a bomb is refused by its header.
        "OPENCV_IO_MAX_IMAGE_PIXELS": str(MAX_PIXELS),
        "PYTHONUNBUFFERED": "1",
        # Else Spark's workers take whatever is called python3.
        "PYSPARK_PYTHON": str(python),
        "PYSPARK_DRIVER_PYTHON": str(python),
        "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
