"""Packages of the npm registry in, their tarballs in a download cache out; read without being unpacked.

`npm pack` does the transfer, so proxies, mirrors and logins set up for npm apply. A tarball is used only when its
checksum is the one that the recipe gives, so what npm or the cache holds can never silently change the data.
"""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

from .recipe import Package

INSTALL_HINT = (
    "npm is not on PATH: install Node.js, which brings it (https://nodejs.org, or `apt-get install npm`), "
    "then run the same command again"
)


def cache_dir() -> Path:
    """Returns the folder that keeps the tarballs: `$XDG_CACHE_HOME/shortclip/npm`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shortclip" / "npm"


def fetch_all(packages: Sequence[Package], cache: Path) -> list[Path]:
    """Returns one verified tarball a package, in order; four downloads at a time. Raises ValueError as `fetch`."""
    pool = ThreadPoolExecutor(max_workers=4)
    try:
        return list(pool.map(fetch, packages, repeat(cache)))
    finally:
        # After one failure the downloads that have not begun would only repeat it.
        pool.shutdown(cancel_futures=True)


def fetch(package: Package, cache: Path) -> Path:
    """Returns the path of the package's tarball in `cache`, downloading it unless a whole one is already there.

    Raises ValueError in one line when npm is missing, when it fails, and when what came is not what was asked for.
    """
    kept = cache / f"{package.name.lstrip('@').replace('/', '-')}-{package.version}.tgz"
    if kept.is_file() and _integrity(kept) == package.integrity:
        return kept
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as folder:
        _npm_pack(package.package, Path(folder))
        arrived = list(Path(folder).glob("*.tgz"))
        if len(arrived) != 1:
            raise ValueError(f"npm pack {package.package} left {len(arrived)} tarballs instead of one; update npm")
        if (found := _integrity(arrived[0])) != package.integrity:
            raise ValueError(
                f"{package.package} arrived with checksum {found[:20]}..., the recipe says "
                f"{package.integrity[:20]}...; the registry or a mirror serves another file"
            )
        arrived[0].replace(kept)
    return kept


def read_json(tarball: Path, *names: str) -> list[Any]:
    """Returns the parsed JSON files of a package, in the order of `names` (paths inside the package).

    A file that the package lacks gives None. Members are read in one pass; nothing is written to disk.
    """
    found: dict[str, Any] = {}
    with tarfile.open(tarball, "r:gz") as tar:
        for member in tar:
            # The first folder is `package` by custom, not by rule.
            name = member.name.partition("/")[2]
            if name in names and (stream := tar.extractfile(member)) is not None:
                found[name] = json.load(stream)
    return [found.get(name) for name in names]


def _npm_pack(spec: str, folder: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError(INSTALL_HINT)
    sys.stderr.write(f"fetching {spec}\n")
    # One retry, after 10 s: npm's own two take over a minute to say that there is no network.
    command = [npm, "pack", spec, "--ignore-scripts", "--loglevel=error", "--no-update-notifier", "--fetch-retries=1"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        raise ValueError(
            f"npm pack {spec} failed ({_reason(done.stderr)[:200]}); check the network and npm's registry, "
            "then run the same command again"
        )


def _reason(stderr: str) -> str:
    """Returns the line of npm's many that says most: the one with an address, else the first, else what there is."""
    errors = re.findall(r"^npm (?:error|ERR!) (?!code|A complete log)(.*\S)", stderr, re.MULTILINE)
    said = [line for line in errors if "://" in line] + errors + stderr.split("\n")
    return said[0].strip() or "no message"


def _integrity(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    return "sha512-" + base64.b64encode(digest).decode()
