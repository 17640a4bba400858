"""The native library's C interface, called without ONNX Runtime."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.library import library_path
from eoracc.plugins.operands import LowRank, NBitsWeight

OK, BAD_OPERAND, NO_SUCH_ISA = range(3)
INSTRUCTION_SETS = {"baseline": 1, "avx2": 2, "avx512": 3}

_TYPES = {np.dtype(np.float32): 1, np.dtype(np.float16): 2, np.dtype(np.int8): 3}
_SIZES = ("rows", "in_features", "out_features", "rank")
_INTS = ("bits", "group_size", "x_type", "scales_type", "lora_a_type", "lora_b_type")
_POINTERS = (
    "x",
    "y",
    "codes",
    "scales",
    "zero_points",
    "bias",
    "lora_a",
    "lora_b",
    "lora_a_scale",
    "lora_b_scale",
)


class Matmul(ctypes.Structure):
    """``eoracc_matmul`` of matmul_nbits_lowrank.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _INTS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
Run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, Task, ctypes.c_void_p)


class Threads(ctypes.Structure):
    """``eoracc_threads``."""

    _fields_ = [("run", Run), ("pool", ctypes.c_void_p)]


def multiply(
    x: NDArray[Any],
    weight: NBitsWeight,
    factors: LowRank | None = None,
    bias: NDArray[Any] | None = None,
    *,
    instruction_set: str,
    factor_scales: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    order: Callable[[int], list[int]] | None = None,
) -> NDArray[Any] | None:
    """The product, None where this processor lacks ``instruction_set``.

    ``order`` maps the number of tasks to the order in which they run.
    """
    y = np.full((len(x), weight.out_features), np.nan, x.dtype)
    operands: dict[str, NDArray[Any] | None] = {
        "x": x,
        "y": y,
        "codes": weight.packed,
        "scales": weight.scales,
        "zero_points": weight.zero_points,
        "bias": bias,
        "lora_a": None if factors is None else factors.lora_a,
        "lora_b": None if factors is None else factors.lora_b,
        "lora_a_scale": None if factor_scales is None else factor_scales[0],
        "lora_b_scale": None if factor_scales is None else factor_scales[1],
    }
    matmul = Matmul(
        rows=len(x),
        in_features=weight.in_features,
        out_features=weight.out_features,
        rank=0 if factors is None else factors.rank,
        bits=weight.bits,
        group_size=weight.group_size,
        x_type=_TYPES[x.dtype],
        scales_type=_TYPES[weight.scales.dtype],
        lora_a_type=0 if factors is None else _TYPES[factors.lora_a.dtype],
        lora_b_type=0 if factors is None else _TYPES[factors.lora_b.dtype],
        **{name: None if a is None else a.ctypes.data for name, a in operands.items()},
    )

    def run(_pool: int, count: int, task: Callable[[int, int], None], data: int) -> None:
        for index in range(count) if order is None else order(count):
            task(data, index)

    result = call(matmul, INSTRUCTION_SETS[instruction_set], Threads(Run(run), None))
    if result == NO_SUCH_ISA:
        return None
    assert result == OK
    return y


def before_a_guard_page(array: NDArray[Any]) -> NDArray[Any]:
    """A copy whose last byte is the last of its page, with a page behind it that none may touch."""
    page = mmap.PAGESIZE
    pages = -(-max(array.nbytes, 1) // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    no_access = 0
    assert libc.mprotect(ctypes.c_void_p(start + pages * page), page, no_access) == 0
    flat = np.frombuffer(memory, np.uint8)[pages * page - array.nbytes : pages * page]
    copy = flat.view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def call(matmul: Matmul, isa: int, threads: Threads | None = None) -> int:
    library = ctypes.CDLL(str(library_path()))
    lent = None if threads is None else ctypes.byref(threads)
    return int(library.eoracc_matmul_nbits_lowrank(ctypes.byref(matmul), lent, isa))
