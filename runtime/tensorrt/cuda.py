"""One GPU through the CUDA driver API: memory, copies and a stream.

The library comes with the driver, so every machine that can run an engine has it. Some twenty C
functions with a stable interface are enough, called through ctypes; CUDA's Python packages would be
a dependency of many megabytes.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from collections.abc import Sequence
from ctypes import c_char_p, c_int, c_size_t, c_ubyte, c_uint, c_uint64, c_void_p
from typing import Any

from numpy.typing import NDArray

from eoracc.errors import BackendError

__all__ = [
    "ALIGNMENT",
    "Device",
    "Driver",
    "Memory",
    "aligned",
    "open_device",
]

ALIGNMENT = 256
"""Alignment in bytes of CUDA's allocations, and of the parts that we place in one."""

_LIBRARIES = ("nvcuda.dll",) if sys.platform == "win32" else ("libcuda.so.1",)

_SUCCESS = 0
_OUT_OF_MEMORY = 2
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_MEMORY_DEVICE = 2
_NAME_BYTES = 256


class _Copy2D(ctypes.Structure):
    """``CUDA_MEMCPY2D`` of cuda.h."""

    _fields_ = (
        ("src_x", c_size_t),
        ("src_y", c_size_t),
        ("src_memory_type", c_uint),
        ("src_host", c_void_p),
        ("src_device", c_uint64),
        ("src_array", c_void_p),
        ("src_pitch", c_size_t),
        ("dst_x", c_size_t),
        ("dst_y", c_size_t),
        ("dst_memory_type", c_uint),
        ("dst_host", c_void_p),
        ("dst_device", c_uint64),
        ("dst_array", c_void_p),
        ("dst_pitch", c_size_t),
        ("width", c_size_t),
        ("height", c_size_t),
    )


# Handles of contexts and streams are pointers; device addresses are 64-bit numbers.
_FUNCTIONS: dict[str, Sequence[Any]] = {
    "cuInit": (c_uint,),
    "cuGetErrorString": (c_int, ctypes.POINTER(c_char_p)),
    "cuDeviceGetCount": (ctypes.POINTER(c_int),),
    "cuDeviceGet": (ctypes.POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (ctypes.POINTER(c_int), c_int, c_int),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuStreamCreate": (ctypes.POINTER(c_void_p), c_uint),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuMemGetInfo_v2": (ctypes.POINTER(c_size_t), ctypes.POINTER(c_size_t)),
    "cuMemAlloc_v2": (ctypes.POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemcpyHtoDAsync_v2": (c_uint64, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_uint64, c_size_t, c_void_p),
    "cuMemcpy2DUnaligned_v2": (ctypes.POINTER(_Copy2D),),
    "cuMemsetD8Async": (c_uint64, c_ubyte, c_size_t, c_void_p),
}


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to :data:`ALIGNMENT`.

    >>> aligned(1), aligned(256), aligned(0)
    (256, 256, 0)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Driver:
    """Functions of the driver's library."""

    def __init__(self, library: ctypes.CDLL) -> None:
        """Look up the functions in ``library`` and initialize the driver.

        Raises:
          BackendError: the driver is too old, or cannot be initialized.
        """
        self._functions: dict[str, Any] = {}
        for name, arguments in _FUNCTIONS.items():
            try:
                function = getattr(library, name)
            except AttributeError:
                raise BackendError(
                    f"the NVIDIA driver of this machine lacks {name}: update the driver"
                ) from None
            function.argtypes = arguments
            function.restype = c_int
            self._functions[name] = function
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - any C type
        """Call a function by name.

        Raises:
          BackendError: the function fails; the text is the driver's.
        """
        code = self._functions[name](*arguments)
        if code == _SUCCESS:
            return
        text = c_char_p()
        self._functions["cuGetErrorString"](code, ctypes.byref(text))
        reason = text.value.decode() if text.value else f"error {code}"
        if code == _OUT_OF_MEMORY:
            raise BackendError(f"there is no memory left on the GPU ({reason})")
        raise BackendError(f"CUDA fails in {name.partition('_')[0]}: {reason}")


class Memory:
    """A block of the GPU's memory, freed with the last reference to it.

    Attributes:
      address: on the device, a multiple of :data:`ALIGNMENT`.
      nbytes: its size.
    """

    def __init__(self, device: Device, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = device.reserve(nbytes)
        # At exit the driver frees everything itself.
        weakref.finalize(self, device.release, self.address).atexit = False


class Device:
    """One GPU with one stream for all work. Threads may share it.

    Attributes:
      name: from the driver.
      compute_capability: for example ``8.6``.
      stream: handle of the stream.
    """

    def __init__(self, driver: Driver, ordinal: int = 0) -> None:
        """Open GPU number ``ordinal`` of those visible to the process.

        Raises:
          BackendError: there is no such GPU, or CUDA fails.
        """
        self._driver = driver
        count = c_int()
        driver.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value <= ordinal:
            raise BackendError(
                f"there is no GPU {ordinal}: the NVIDIA driver shows {count.value} to this "
                "process (see CUDA_VISIBLE_DEVICES)"
            )
        handle = c_int()
        driver.call("cuDeviceGet", ctypes.byref(handle), ordinal)
        name = ctypes.create_string_buffer(_NAME_BYTES)
        driver.call("cuDeviceGetName", name, _NAME_BYTES, handle.value)
        self.name = name.value.decode(errors="replace")
        major, minor = (
            self._attribute(handle.value, which) for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        self.compute_capability = f"{major}.{minor}"
        # TensorRT uses the primary context too; it is kept for the lifetime of the process.
        context = c_void_p()
        driver.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), handle.value)
        self._context = context
        self._before = self._used_bytes()
        stream = c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), 0)
        self.stream = stream.value or 0
        weakref.finalize(self, _destroy_stream, driver, context, self.stream).atexit = False

    def _attribute(self, handle: int, which: int) -> int:
        value = c_int()
        self._driver.call("cuDeviceGetAttribute", ctypes.byref(value), which, handle)
        return value.value

    def _call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 - any C type
        # The context is current for one thread only, and any thread may call.
        self._driver.call("cuCtxSetCurrent", self._context)
        self._driver.call(name, *arguments)

    # --- memory -----------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> Memory:
        """Allocate memory, at least one byte; its content is arbitrary.

        Raises:
          BackendError: memory is exhausted.
        """
        return Memory(self, max(nbytes, 1))

    def reserve(self, nbytes: int) -> int:
        """The address of newly allocated memory; called by :class:`Memory`."""
        address = c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), nbytes)
        return address.value

    def release(self, address: int) -> None:
        """Free memory of :meth:`reserve`."""
        self._call("cuMemFree_v2", address)

    def taken_bytes(self) -> int:
        """Growth of the GPU memory in use since this was opened, by all processes."""
        return self._used_bytes() - self._before

    def _used_bytes(self) -> int:
        free, total = c_size_t(), c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    # --- work in the order of the stream ----------------------------------------------------------

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy a C-contiguous ``array`` to ``address``; the array may be changed afterwards."""
        # CUDA has copied pageable memory when the call returns.
        if array.nbytes:
            self._call(
                "cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream
            )

    def download(self, address: int, array: NDArray[Any]) -> None:
        """Fill a C-contiguous ``array`` from ``address``; complete after :meth:`synchronize`."""
        if array.nbytes:
            self._call(
                "cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream
            )

    def clear(self, address: int, nbytes: int) -> None:
        """Fill with zeros."""
        if nbytes:
            self._call("cuMemsetD8Async", address, 0, nbytes, self.stream)

    def copy_pieces(
        self, source: int, source_step: int, target: int, target_step: int, *, nbytes: int, n: int
    ) -> None:
        """Copy ``n`` pieces of ``nbytes`` at distances of ``source_step`` and ``target_step``.

        Uses the driver's only copy without a limit on the distances. It runs in the default stream,
        which synchronizes with this device's stream in both directions.
        """
        if not nbytes or not n:
            return
        copy = _Copy2D(
            src_memory_type=_MEMORY_DEVICE,
            src_device=source,
            src_pitch=source_step,
            dst_memory_type=_MEMORY_DEVICE,
            dst_device=target,
            dst_pitch=target_step,
            width=nbytes,
            height=n,
        )
        self._call("cuMemcpy2DUnaligned_v2", ctypes.byref(copy))

    def synchronize(self) -> None:
        """Wait until all work is complete.

        Raises:
          BackendError: some of it has failed.
        """
        self._call("cuStreamSynchronize", self.stream)


def _destroy_stream(driver: Driver, context: c_void_p, stream: int) -> None:
    driver.call("cuCtxSetCurrent", context)
    driver.call("cuStreamDestroy_v2", stream)


def _open_driver() -> Driver:
    """Open the NVIDIA driver of this machine.

    Raises:
      BackendError: there is none.
    """
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        return Driver(library)
    raise BackendError(
        f"no NVIDIA driver is found on this machine: there is no {' or '.join(_LIBRARIES)}, and "
        "engines run on an NVIDIA GPU only"
    )


def open_device() -> Device:
    """Open the first GPU visible to the process.

    Raises:
      BackendError: there is no driver or no GPU.
    """
    return Device(_open_driver())
