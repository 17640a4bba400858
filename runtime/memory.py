"""Memory of this process: release what is free, measure what is in use."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

__all__ = ["peak_bytes", "release_heap", "release_memory", "release_weights", "resident_bytes"]

_STATUS = Path("/proc/self/status")
_MAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ +(.*)$")
_MADV_DONTNEED = 4


def release_memory() -> None:
    """Collect garbage and, on Linux, return free pages of the heap and mapped weights.

    glibc keeps freed pages: tokenizing a book leaves 0.4 GB behind, which would count as memory of
    the process for the rest of the build.
    """
    gc.collect()
    release_heap()
    release_weights()


def release_heap() -> None:
    """On Linux, return free pages of the heap, in a millisecond or two."""
    # Only glibc has malloc_trim; musl does not need it.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def release_weights() -> None:
    """On Linux, release the pages of safetensors files that were read through a mapping.

    The system's cache keeps them anyway; until released, they count as memory of the process too.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    for start, end in _clean_weights():
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _clean_weights() -> list[tuple[int, int]]:
    """Address ranges of mapped safetensors files without writes.

    Data written to a private mapping exists nowhere else, so such a range is left out.
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
    """Memory in use by this process; its peak on systems without /proc."""
    return _status_bytes("VmRSS")


def peak_bytes() -> int:
    """Largest memory that this process has used."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    # Second choice on Linux, where a child starts with the peak of its parent.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
