"""Memory of this process: give back what is free, say what is held."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from pathlib import Path

__all__ = ["peak_bytes", "release_memory", "resident_bytes"]

_STATUS = Path("/proc/self/status")


def release_memory() -> None:
    """Collect garbage and, with glibc, return the heap's free pages.

    glibc keeps what a stage has freed: tokenizing a book leaves 0.4 GB behind, which would count
    for the rest of the build.
    """
    gc.collect()
    if sys.platform == "linux":
        # musl has no malloc_trim, and no need of it.
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resident_bytes() -> int:
    """What this process holds in memory now; its peak where the system does not say (no /proc)."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """The most that this process has held in memory."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    # Not the first choice on Linux: there a child starts with the peak of its parent.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
