"""What a figure was measured with: machine, its load, versions, commit. Every benchmark's JSON carries it."""

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

_PACKAGES = ("numpy", "simplejpeg", "opencv-python-headless", "nvidia-dali-cuda120", "tokenizers")


def environment() -> dict[str, str | int | float | None]:
    """Returns plain JSON values; None for what this machine does not tell."""
    versions = {name: _version(name) for name in _PACKAGES}
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": cuda,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "commit": _commit(),
    }


def warn_of_load(consequence: str) -> None:
    """Says so on stderr where others use the machine, and what that does to the figures."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load > cores / 2:
        print(f"load average {load:.1f} on {cores} cores: {consequence}", file=sys.stderr)


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None
