"""The native library's C interface, called without ONNX Runtime."""

from __future__ import annotations

import ctypes
import mmap
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.plugins.library import INSTRUCTION_SETS, library_path
from eoracc.plugins.operands.codes import TILE
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.cases import Array, Case, random_case

OK, BAD_OPERAND, NO_SUCH_ISA = range(3)
# Those of the other architecture are tested where it runs (make test-aarch64).
ISAS = tuple(
    name
    for name in INSTRUCTION_SETS
    if name == "scalar" or name.startswith("neon") == (platform.machine() == "aarch64")
)
ACTIVATIONS = {"": 0, "silu": 1, "gelu_tanh": 2}

_TYPES = {"float32": 1, "float16": 2, "int8": 3, "bfloat16": 4, "int4": 5}

_SIZES = ("rows", "in_features", "out_features", "rank")
_INTS = (
    "bits",
    "group_size",
    "accuracy_level",
    "activation",
    "part_count",
    "x_type",
    "scales_type",
    "lora_a_type",
    "lora_b_type",
)
_POINTERS = (
    "parts",
    "ranks",
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
    "norm_weight",
    "residual",
    "bank",
)


class Bank(ctypes.Structure):
    """``eoracc_bank`` of matmul_nbits_lowrank.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("count", "rank", "index_count", "index_rows")),
        ("type", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("a", "b", "a_scale", "b_scale", "index")),
    ]


class Matmul(ctypes.Structure):
    """``eoracc_matmul`` of matmul_nbits_lowrank.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_int32) for name in _INTS),
        ("norm_epsilon", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


Task = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)
Run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t, Task, ctypes.c_void_p)


class Threads(ctypes.Structure):
    """``eoracc_threads``."""

    _fields_ = [("run", Run), ("pool", ctypes.c_void_p)]


# --- layout ---------------------------------------------------------------------------------------


def tile_codes(weight: NBitsWeight) -> NDArray[np.uint8]:
    """``uint8 [ceil(N/16), bytes of a tile]``."""
    rows, columns = weight.out_features, weight.in_features
    library = _library()
    library.eoracc_tile_bytes.restype = ctypes.c_size_t
    tile_bytes = library.eoracc_tile_bytes(ctypes.c_int64(columns), weight.bits)
    tiled = np.empty((-(-rows // TILE), tile_bytes), np.uint8)
    library.eoracc_tile_codes(
        ctypes.c_void_p(weight.packed.ctypes.data),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        weight.bits,
        ctypes.c_int64(weight.group_size),
        ctypes.c_void_p(tiled.ctypes.data),
    )
    return tiled


def tile_elements(plain: Array) -> Array:
    """``[rows, columns]`` to ``[ceil(rows/16), columns, 16]``."""
    rows, columns = plain.shape
    plain = np.ascontiguousarray(plain)
    tiled = np.empty((-(-rows // TILE), columns, TILE), plain.dtype)
    _library().eoracc_tile_elements(
        ctypes.c_void_p(plain.ctypes.data),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_size_t(plain.itemsize),
        ctypes.c_void_p(tiled.ctypes.data),
    )
    return tiled


def tile_int8(plain: NDArray[np.int8]) -> NDArray[np.uint8]:
    """``int8 [rows, columns]`` to ``uint8 [ceil(rows/16), ceil(columns/4), 64]``."""
    rows, columns = plain.shape
    plain = np.ascontiguousarray(plain)
    tiled = np.empty((-(-rows // TILE), -(-columns // 4), 64), np.uint8)
    _library().eoracc_tile_int8(
        ctypes.c_void_p(plain.ctypes.data),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        ctypes.c_void_p(tiled.ctypes.data),
    )
    return tiled


@dataclass
class Call:
    """A call of the kernel: its structure and the arrays that it points into."""

    matmul: Matmul
    y: Array
    arrays: dict[str, Array | None] = field(repr=False)
    bank: Bank | None = None


def prepare(case: Case, place: Callable[[Array], Array] = lambda array: array) -> Call:
    """Tile the operands of ``case``; ``place`` may move each array elsewhere."""
    weight, factors = case.weight, case.factors
    y = np.full((len(case.x), case.width), np.nan).astype(case.x.dtype)
    operands: dict[str, Array | None] = {
        "x": case.x,
        "codes": tile_codes(weight),
        "scales": tile_elements(weight.scales),
        "zero_points": None if weight.zero_points is None else tile_elements(weight.zero_points),
        "bias": case.bias,
        "norm_weight": case.norm_weight,
        "residual": case.residual,
    }
    if factors is not None:
        operands |= _ranked(case, factors) if case.ranks else _tile_factors(factors)
    bank, bank_arrays = _bank_of(case, place)
    arrays = {name: None if a is None else place(a) for name, a in operands.items()}
    arrays["parts"] = np.array(case.parts, np.int64) if case.parts else None
    arrays["ranks"] = np.array(case.ranks, np.int64) if case.ranks else None
    arrays["y"] = y
    matmul = Matmul(
        rows=len(case.x),
        in_features=weight.in_features,
        out_features=weight.out_features,
        rank=case.rank,
        bits=weight.bits,
        group_size=weight.group_size,
        accuracy_level=case.accuracy_level,
        activation=ACTIVATIONS[case.activation],
        part_count=max(1, len(case.parts)),
        norm_epsilon=case.norm_epsilon,
        x_type=_TYPES[case.x.dtype.name],
        scales_type=_TYPES[weight.scales.dtype.name],
        lora_a_type=0 if factors is None else _type_of(factors.lora_a, factors.bits),
        lora_b_type=0 if factors is None else _type_of(factors.lora_b, factors.bits),
        bank=None if bank is None else ctypes.addressof(bank),
        **{name: None if a is None else a.ctypes.data for name, a in arrays.items()},
    )
    return Call(matmul, y, arrays | bank_arrays, bank)


def _tile_factors(factors: LowRank) -> dict[str, Array | None]:
    return {
        "lora_a": _tile_factor(factors.lora_a, factors.bits),
        "lora_b": _tile_factor(factors.lora_b, factors.bits),
        "lora_a_scale": _tile_scale(factors.lora_a_scale),
        "lora_b_scale": _tile_scale(factors.lora_b_scale),
    }


def _ranked(case: Case, factors: LowRank) -> dict[str, Array | None]:
    """What the parts have alone, one after the other; nothing for a part of rank 0."""
    stacks: dict[str, list[Array]] = {}
    first = 0
    for part, (features, rank) in enumerate(zip(case.parts, case.ranks, strict=True)):
        down = slice(part * case.rank, part * case.rank + rank)
        up = slice(first, first + features)
        first += features
        a_scale, b_scale = factors.lora_a_scale, factors.lora_b_scale
        own = LowRank(
            lora_a=factors.lora_a[down],
            lora_b=factors.lora_b[up, :rank],
            lora_a_scale=None if a_scale is None else a_scale[down],
            lora_b_scale=None if b_scale is None else b_scale[up],
            bits=factors.bits,
        )
        for name, array in _tile_factors(own).items():
            if rank and array is not None:
                lanes = array.shape[-1]
                flat = array.reshape(-1, lanes) if name == "lora_b" else array
                stacks.setdefault(name, []).append(flat)
    return {name: np.concatenate(stack) for name, stack in stacks.items()}


def _bank_of(
    case: Case, place: Callable[[Array], Array]
) -> tuple[Bank | None, dict[str, Array | None]]:
    """The bank and its arrays, named as the op's inputs."""
    if not case.adapters:
        return None, {}
    parts, rank = max(1, len(case.parts)), case.adapter_rank
    stacks: dict[str, list[Array]] = {}
    for factors in case.adapters:
        own = factors.lora_b.shape[1]

        def by_part(rows: Array, own: int = own) -> Array:
            """Each part's rows, filled up to the bank's rank with zeros."""
            filled = np.zeros((parts, rank, *rows.shape[1:]), rows.dtype)
            filled[:, :own] = rows.reshape(parts, own, *rows.shape[1:])
            return filled.reshape(parts * rank, *rows.shape[1:])

        lora_b = np.zeros((len(factors.lora_b), rank), factors.lora_b.dtype)
        lora_b[:, :own] = factors.lora_b
        down_scale = factors.lora_a_scale
        if down_scale is None:
            down_scale = np.ones(parts * own, np.float32)
        adapter: dict[str, Array | None] = {
            "adapter_a": _tile_factor(by_part(factors.lora_a), factors.bits),
            "adapter_b": _tile_factor(lora_b, factors.bits),
            "adapter_a_scale": by_part(down_scale),
            "adapter_b_scale": _tile_scale(factors.lora_b_scale),
        }
        for name, array in adapter.items():
            if array is not None:
                flat = array.ravel() if name.endswith("_scale") else array
                stacks.setdefault(name, []).append(flat)
    arrays: dict[str, Array | None] = {
        name: place(np.stack(stack)) for name, stack in stacks.items()
    }
    index = arrays["adapter_index"] = place(np.array(case.adapter_index, np.int32))
    pointers = {name: None if a is None else a.ctypes.data for name, a in arrays.items()}
    bank = Bank(
        count=len(case.adapters),
        rank=rank,
        index_count=len(index),
        index_rows=len(case.x) // max(1, len(index)),
        type=_type_of(case.adapters[0].lora_a, case.adapters[0].bits),
        **{name: pointers.get(f"adapter_{name}") for name in ("a", "b", "a_scale", "b_scale")},
        index=index.ctypes.data,
    )
    return bank, arrays


def _type_of(factor: Array, bits: int) -> int:
    return _TYPES[f"int{bits}" if factor.dtype == np.int8 else factor.dtype.name]


def _tile_factor(values: Array, bits: int) -> Array:
    if values.dtype != np.int8:
        return tile_elements(values)
    return tile_int8(values) if bits == 8 else tile_int4(values)


def tile_int4(plain: NDArray[np.int8]) -> NDArray[np.uint8]:
    """``int8 [rows, columns]`` in -7..7 to ``uint8 [ceil(rows/16), ceil(columns/8), 64]``."""
    rows, columns = plain.shape
    codes = np.full((-(-rows // TILE) * TILE, -(-columns // 8) * 8), 8, np.uint8)
    codes[:rows, :columns] = plain + 8
    quads = tile_int8((codes.astype(np.int16) - 128).astype(np.int8))
    low, high = quads[:, 0::2], quads[:, 1::2]
    return np.ascontiguousarray(low | high << 4)


def _tile_scale(scale: NDArray[np.float32] | None) -> Array | None:
    return None if scale is None else tile_elements(scale[:, None])


def multiply(
    case: Case,
    *,
    instruction_set: str,
    order: Callable[[int], list[int]] | None = None,
    place: Callable[[Array], Array] = lambda array: array,
) -> Array:
    """The product; the test is skipped where this processor lacks ``instruction_set``.

    ``order`` maps the number of tasks to the order in which they run.
    """
    require(instruction_set)
    prepared = prepare(case, place)

    def run(_pool: int, count: int, task: Callable[[int, int], None], data: int) -> None:
        for index in range(count) if order is None else order(count):
            task(data, index)

    threads = Threads(Run(run), None)
    assert call(prepared.matmul, INSTRUCTION_SETS[instruction_set], threads) == OK
    return prepared.y


@cache
def supported() -> tuple[str, ...]:
    """The instruction sets that this processor and this library have."""
    matmul = prepare(random_case(np.random.default_rng(0), 1, (1, 8), group_size=8)).matmul
    return tuple(name for name, isa in INSTRUCTION_SETS.items() if call(matmul, isa) != NO_SUCH_ISA)


def require(instruction_set: str) -> None:
    """Skip the test where this processor lacks ``instruction_set``.

    All skips are raised here: pytest folds those of one line and reason into one line of its
    summary.
    """
    if instruction_set not in supported():
        pytest.skip(f"this processor has no {instruction_set}")


def before_a_guard_page(array: Array) -> Array:
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
    lent = None if threads is None else ctypes.byref(threads)
    return int(_library().eoracc_matmul_nbits_lowrank(ctypes.byref(matmul), lent, isa))


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path()))
