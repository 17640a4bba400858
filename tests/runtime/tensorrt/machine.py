"""What the machine of the stand-ins is like."""

from __future__ import annotations

import ctypes
import gc
import sys
from typing import TYPE_CHECKING

from tests.runtime.tensorrt.stand_in import make_tensorrt

if TYPE_CHECKING:
    import pytest

__all__ = ["GIB", "Machine"]

GIB = 1 << 30


class Machine:
    """A GPU whose memory is the host's."""

    def __init__(self, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
        self._library = library
        self._monkeypatch = monkeypatch
        library.stand_in_reset.argtypes = (
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_size_t,
        )
        library.stand_in_used.restype = ctypes.c_size_t

    def set_up(
        self, *, devices: int = 1, capability: tuple[int, int] = (8, 6), memory: int = GIB
    ) -> None:
        """Let it have so many GPUs, of such a kind."""
        self._library.stand_in_reset(devices, *capability, memory)

    def install_tensorrt(self, version: str | None) -> None:
        """Another version of TensorRT for RTX, or none."""
        module = None if version is None else make_tensorrt(version)
        self._monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)

    def used(self) -> int:
        """Bytes of the GPU that are allocated."""
        gc.collect()
        return int(self._library.stand_in_used())
