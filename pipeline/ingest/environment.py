"""The environment that img2dataset runs in: `.venv-ingest`, made on first use from requirements-ingest.txt.

img2dataset pins packages that this project must not follow, so it is called as a program and never imported. What an
engine needs (pyspark and Java, ray) is not part of it and is looked for before anything starts.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path
from typing import Literal

from ..files import write_text

Distributor = Literal["multiprocessing", "pyspark", "ray"]

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements-ingest.txt"
FOLDER = ROOT / ".venv-ingest"
ENGINES = {"pyspark": "pyspark>=3.5,<5", "ray": "ray>=2.40,<3"}
_MARK = ".installed"


def is_ready() -> bool:
    """Returns whether the environment is there, as its requirements are."""
    return (FOLDER / "bin" / "python").exists() and _installed() == _wanted()


def _wanted() -> str:
    return hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()


def _installed() -> str | None:
    try:
        return (FOLDER / _MARK).read_text()
    except FileNotFoundError:
        return None


def python() -> Path:
    """Returns the environment's Python, made first if it is missing or older than its requirements.

    Raises ValueError in one line where pip fails.
    """
    binary = FOLDER / "bin" / "python"
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / ".lock").open("a") as lock:
        # Two commands on a fresh clone: the second waits for the first.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_ready():
            return binary
        print(f"making {FOLDER} for img2dataset (a minute or two, once)", file=sys.stderr)
        if not binary.exists():
            venv.create(FOLDER, with_pip=True, symlinks=True)
        install = [str(binary), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run([*install, "-r", str(REQUIREMENTS)], capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1] if lines else "pip failed"
            raise ValueError(f"{FOLDER} cannot be made: {reason}; run the same command again")
        write_text(FOLDER / _MARK, _wanted())
    return binary


def check_engine(binary: Path, distributor: Distributor) -> None:
    """Raises ValueError, in one line that says what to install, where a distributor's engine is missing.

    img2dataset itself ends without an error then, and has written nothing.
    """
    if distributor == "multiprocessing":
        return
    if distributor == "pyspark" and not (shutil.which("java") or os.environ.get("JAVA_HOME")):
        raise ValueError(
            "--distributor pyspark needs Java 17, which is not on PATH: `apt-get install openjdk-17-jre-headless`"
        )
    found = subprocess.run([str(binary), "-c", f"import {distributor}"], capture_output=True, check=False)
    if found.returncode:
        raise ValueError(
            f"--distributor {distributor} needs {distributor} beside img2dataset: "
            f"`{binary} -m pip install '{ENGINES[distributor]}'`"
        )
