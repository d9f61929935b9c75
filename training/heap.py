"""Keeps the memory that a step frees, for the next step to use: on a CPU every step allocates the same tensors anew."""

import ctypes
import sys

# Of glibc's mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Returns whether this C library can: from here on memory once freed stays with the process.

    By itself glibc hands every block of over 32 MB back to the kernel, which clears it page by page when it is asked
    for again: of B/16 at 256 pairs a step that is a million page faults and a tenth of its CPU time. The process stays
    as large as it was at its largest. What this gave is measured by `python -m benchmarks.step --parts`.
    """
    return _mallopt(_NEVER, _NEVER)


def give_freed_memory_back() -> bool:
    """Undoes `keep_freed_memory`, with glibc's largest thresholds; for benchmarks, which compare the two."""
    return _mallopt(32 << 20, 64 << 20)


def _mallopt(map_from: int, trim_from: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, map_from) and mallopt(_M_TRIM_THRESHOLD, trim_from))
