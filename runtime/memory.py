"""Memory of this process: give back what is free, say what is held."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

__all__ = ["peak_bytes", "release_memory", "release_weights", "resident_bytes"]

_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(.*)$")
_MADV_DONTNEED = 4


def release_memory() -> None:
    """Collect garbage and, on Linux, return the heap's free pages and the checkpoint's.

    glibc keeps what a stage has freed: tokenizing a book leaves 0.4 GB behind, which would count
    for the rest of the build.
    """
    gc.collect()
    # Only glibc has malloc_trim: musl has no need of it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
    release_weights()


def release_weights() -> None:
    """On Linux, let go of the pages of checkpoints that were read through a mapping.

    They stay in the system's cache anyway; until they are let go, they count as this process's too.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, end in _clean_weights():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _clean_weights() -> list[tuple[int, int]]:
    """Address ranges of mapped safetensors files that nobody has written to.

    What has been written to a private mapping exists nowhere else: such a range is left alone.
    """
    try:
        lines = _MAPS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    clean: list[tuple[int, int]] = []
    current: tuple[int, int] | None = None
    for line in lines:
        mapping = _MAPPING.match(line)
        if mapping is not None:
            start, end, path = mapping.groups()
            current = (int(start, 16), int(end, 16)) if path.endswith(".safetensors") else None
        elif current is not None and line.startswith("Anonymous:"):
            if int(line.split()[1]) == 0:
                clean.append(current)
            current = None
    return clean


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
