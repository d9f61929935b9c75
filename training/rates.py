"""How fast a run is, over all ranks: pairs and tokens a second, the share of waiting for data, and MFU.

MFU sets the model's work, 3 times the forward pass's multiplications whatever is computed again, against what the
devices could compute at best.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Generator

import torch

from model.clip import gflops_per_pair
from model.presets import ModelConfig

from .distributed import World
from .fields import Config

_BF16_DENSE = {
    "H200": 989.4e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.4e12,
    "A100": 312e12,
}
"""FLOPS of dense bf16 tensor cores, from NVIDIA's data sheets; the first name that is part of the device's counts."""


class Rates:
    """The time of the steps between two log lines. What comes between a line and `restart` is left out."""

    def __init__(self, config: Config, encoders: ModelConfig, device: torch.device, world: World) -> None:
        """All ranks make one, and ask at the same steps. Measures what a CPU can do, for a sixth of a second."""
        self._config, self._device, self._world = config, device, world
        self._flops_a_pair = 3e9 * sum(gflops_per_pair(encoders, config.tokens, config.text_tokens))
        peaks = [peak for peak in world.each(peak_flops(device)) if peak is not None]
        self._peak = sum(peaks) if len(peaks) == world.size else None
        self._start = time.perf_counter()
        self.restart()

    @property
    def run_s(self) -> float:
        """Seconds since the run's first step."""
        return max(time.perf_counter() - self._start, 1e-9)

    def restart(self) -> None:
        self._begin = time.perf_counter()
        self._waited_s = 0.0

    def leave_out(self, seconds: float) -> None:
        """Takes the last so many seconds out of the time of the steps."""
        self._begin += seconds

    @contextlib.contextmanager
    def waiting(self) -> Generator[None]:
        begin = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - begin

    def since_last(self, num_steps: int) -> dict[str, float | None]:
        """Returns the rates of the last steps. Of waiting and memory, those of the rank that has most."""
        elapsed_s = max(time.perf_counter() - self._begin, 1e-9)
        of_ranks = self._world.each((self._waited_s / elapsed_s, memory_gib(self._device)))
        waits, memories = zip(*of_ranks, strict=True)
        return {
            **self.of(num_steps, elapsed_s),
            "data_wait_fraction": max(waits),
            "memory_gib": max(memories),
        }

    def of(self, num_steps: int, elapsed_s: float) -> dict[str, float | None]:
        """Returns what so many steps in so many seconds come to, over all ranks."""
        images_per_s = num_steps * self._config.batch_size / elapsed_s
        return {
            "images_per_s": images_per_s,
            "tokens_per_s": images_per_s * (self._config.tokens + self._config.text_tokens),
            "mfu": images_per_s * self._flops_a_pair / self._peak if self._peak else None,
        }


def peak_flops(device: torch.device) -> float | None:
    """Returns floating point operations a second: a GPU's by its data sheet in bf16, None for one that is not listed;
    a CPU's as measured now, in float32, with the threads that torch has."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        return next((flops for known, flops in _BF16_DENSE.items() if known in name), None)
    return _measured_flops()


def _measured_flops(size: int = 768, least_s: float = 0.15) -> float:
    """Returns the best rate of a matrix product: a machine that does other things shows less in most of them."""
    a, b = torch.ones(size, size), torch.ones(size, size)
    out = a @ b
    fastest, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < least_s:
        before = time.perf_counter()
        torch.mm(a, b, out=out)
        fastest = min(fastest, time.perf_counter() - before)
    return 2 * size**3 / fastest


def memory_gib(device: torch.device) -> float:
    """Returns the most memory so far, in GiB: allocated by torch on a GPU, or this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) / 2**30
