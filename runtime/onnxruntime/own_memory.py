"""Keep a loaded model independent of its files, which may be overwritten in place.

ONNX Runtime maps weights, and the system's loader maps the native library. A tool that truncates
and rewrites a mapped file, as ``cp`` does, changes the numbers of a running model or ends its
process with a signal. On Linux, these functions keep both in the process's own memory; elsewhere
they change nothing.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eoracc.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["library_in_memory", "own_mapped_files"]

_MAPS = "/proc/self/maps"
_MAY_MOVE, _FIXED = 1, 2
"""Flags of ``mremap``."""

_FAILED = ctypes.c_void_p(-1).value

_copies: dict[bytes, int] = {}
_lock = threading.Lock()


@dataclass(frozen=True)
class _Mapping:
    """Part of a file in memory: an address, bytes, ``rwxp``, and the file's path."""

    start: int
    size: int
    access: str
    path: str


def library_in_memory(path: Path) -> str:
    """A path that loads a copy of a library which nobody can overwrite.

    The copy lives as long as the process, and equal libraries share one: the loader takes two
    libraries of one path for the same.

    Returns:
      The path of the copy, or ``path`` on a system without files in memory.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).digest()
    with _lock:
        if digest not in _copies:
            try:
                descriptor = os.memfd_create(path.name)
            except (AttributeError, OSError):
                return str(path)
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(content)
            _copies[digest] = descriptor
        return f"/proc/self/fd/{_copies[digest]}"


def own_mapped_files(folder: Path) -> None:
    """Replace what is mapped from the data files in ``folder`` by copies, at the same addresses.

    The memory in use stays the same: each part of a file is released as soon as it is copied.
    No other thread may use the files meanwhile. Libraries stay mapped.

    Raises:
      BackendError: memory is exhausted.
    """
    mappings = list(_mappings(folder))
    libraries = {mapping.path for mapping in mappings if "x" in mapping.access}
    for mapping in mappings:
        if mapping.path not in libraries:
            _own(mapping)


def _mappings(folder: Path) -> Iterator[_Mapping]:
    start = os.fsencode(folder.resolve()).replace(b"\n", rb"\012") + b"/"
    try:
        with open(_MAPS, "rb") as file:  # noqa: PTH123 - not a file of this package
            lines = file.readlines()
    except OSError:
        return
    for line in lines:
        addresses, access, *_, path = line.rstrip(b"\n").split(None, 5)
        if path.startswith(start):
            first, last = (int(address, 16) for address in addresses.split(b"-"))
            yield _Mapping(first, last - first, access.decode(), os.fsdecode(path))


def _own(mapping: _Mapping) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    libc.mmap.restype = libc.mremap.restype = pointer
    libc.mmap.argtypes = [pointer, size, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    libc.mremap.argtypes = [pointer, size, size, ctypes.c_int, pointer]
    readable = mmap.PROT_READ | mmap.PROT_WRITE
    copy = libc.mmap(None, mapping.size, readable, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    if copy != _FAILED:
        ctypes.memmove(copy, mapping.start, mapping.size)
        moved = libc.mremap(copy, mapping.size, mapping.size, _MAY_MOVE | _FIXED, mapping.start)
        if moved == mapping.start:
            return
    raise BackendError(
        f"{mapping.path}: cannot be copied into memory: {os.strerror(ctypes.get_errno())}: free "
        "some memory"
    )
