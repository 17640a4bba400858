"""The low-rank terms of the linear and of its adapters, in standard ops."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from eoracc.plugins.functions.body import Body
from eoracc.plugins.functions.weights import tile_columns
from eoracc.plugins.operands.codes import QUAD, TILE, VECTOR

__all__ = ["add_adapter", "plain_low_rank", "ranked_low_rank", "tiled_low_rank"]


@dataclass(frozen=True)
class _Width:
    """How to unpack tiles of an integer factor; its shape distinguishes 8 from 4 bits at run time.

    Attributes:
      shifts: position of each code in a byte, ``uint8 [1, 1]`` or ``[2, 1]``.
      mask: of one code, ``uint8 []``.
      zero: code of the value 0, ``float32 []``.
    """

    shifts: ir.Value
    mask: ir.Value
    zero: ir.Value

    @classmethod
    def of(cls, body: Body, tiled: ir.Value) -> _Width:
        """The width of the codes in ``tiled [..., chunks, 64]``, tiles of K columns."""
        chunks = body.op("Shape", tiled, start=-2, end=-1)
        quad = body.scalar(QUAD)
        quads = body.op("Add", body.scalar("K"), body.scalar(QUAD - 1))
        is_int8 = body.op("Equal", chunks, body.op("Div", quads, quad))
        bits = body.op("Where", is_int8, body.scalar(8), quad)
        bits = body.op("Reshape", bits, body.constant(np.zeros(0, np.int64)))
        shifts = body.op("Range", body.scalar(0), body.scalar(8), bits)
        shifts = body.op("Cast", shifts, to=int(ir.DataType.UINT8))
        unused = body.op("Sub", body.scalar(8), bits)
        unused = body.op("Cast", unused, to=int(ir.DataType.UINT8))
        byte = body.constant(np.array(255, np.uint8))
        mask = body.op("BitShift", byte, unused, direction="RIGHT")
        half = body.constant(np.array(0.5, np.float32))
        zero = body.op("Add", body.op("Mul", body.as_float(mask), half), half)
        return cls(body.op("Unsqueeze", shifts, body.integers(1)), mask, zero)

    @classmethod
    def int8(cls, body: Body) -> _Width:
        """The width of 8-bit codes, without a test at run time."""
        return cls(
            body.constant(np.zeros((1, 1), np.uint8)),
            body.constant(np.array(255, np.uint8)),
            body.constant(np.array(128, np.float32)),
        )

    def columns(self, body: Body) -> ir.Value:
        """Columns in a vector of 64 bytes, ``int64 [1]``."""
        return body.op("Mul", body.op("Shape", self.shifts, start=0, end=1), body.scalar(QUAD))

    def values(self, body: Body, tiled: ir.Value) -> ir.Value:
        """``uint8 [A, tiles, chunks, 64]`` to ``float32 [A, chunks, codes, 4, tiles, 16]``.

        ``codes`` counts those in a byte. The middle three axes are columns, the last two rows.
        """
        codes = body.op("Unsqueeze", tiled, body.integers(3))
        codes = body.op("BitShift", codes, self.shifts, direction="RIGHT")
        codes = body.op("BitwiseAnd", codes, self.mask)
        codes = body.op("Reshape", codes, body.integers(0, 0, 0, 0, TILE, QUAD))
        codes = body.op("Transpose", codes, perm=[0, 2, 3, 5, 1, 4])
        return body.op("Sub", body.as_float(codes), self.zero)


def _tiled_factor(body: Body, name: str) -> ir.Value:
    """A tiled low-rank factor as float32, transposed, padding included."""
    scale = body.get(f"{name}_scale")
    if scale is None:
        return tile_columns(body, body[name])
    values = _width(body).values(body, body.op("Unsqueeze", body[name], body.integers(0)))
    return body.op("Mul", body.op("Flatten", values, axis=4), scale)


def _width(body: Body) -> _Width:
    """The width of integer factors: both have one, and the columns of lora_a are known, K.

    Beside a float factor integers always have 8 bits.
    """
    is_integer = body.get("lora_a_scale") is not None
    return _Width.of(body, body["lora_a"]) if is_integer else _Width.int8(body)


def tiled_low_rank(body: Body, x: ir.Value, parts: int) -> ir.Value:
    """``(x lora_a^T) lora_b^T`` from tiles, each part with its own rows of ``lora_a``."""
    a = _down_factor(body)
    b = _tiled_factor(body, "lora_b")
    b = body.op("Slice", b, body.integers(0), body.attribute("N"), body.integers(1))
    down = body.op("MatMul", x, a)
    if parts > 1:
        return _up_by_part(body, down, b, body.attribute("parts"), parts, axis=1)
    # Ranks of A are padded to tiles, those of B to quads; the padding is zero.
    rank = body.op("Shape", b, start=0, end=1)
    down = body.op("Slice", down, body.integers(0), rank, body.integers(-1))
    return body.op("MatMul", down, b)


def _down_factor(body: Body) -> ir.Value:
    """``lora_a`` as ``float32 [K, rows]``, rows that pad tiles included."""
    a = _tiled_factor(body, "lora_a")
    return body.op("Slice", a, body.integers(0), body.attribute("K"), body.integers(0))


def ranked_low_rank(body: Body, x: ir.Value, parts: int) -> ir.Value:
    """``(x lora_a^T) lora_b^T`` from tiles of parts that each have a rank of their own."""
    rows, ranks = body.attribute("parts"), body.attribute("ranks")
    tile = body.scalar(TILE)
    down = body.op("MatMul", x, _down_factor(body))
    padded = body.op("Mul", _ceil_div(body, ranks, tile), tile)
    downs = body.ops("Split", parts, down, padded, axis=-1)
    ups = _up_factors(body, parts, body.op("Div", rows, tile), rows, ranks)
    products = []
    for own, up in zip(downs, ups, strict=True):
        # Ranks of A are padded to tiles, those of B to quads; the padding is zero.
        rank = body.op("Shape", up, start=0, end=1)
        used = body.op("Slice", own, body.integers(0), rank, body.integers(-1))
        products.append(body.op("MatMul", used, up))
    return body.op("Concat", *products, axis=-1)


def _up_factors(
    body: Body, parts: int, tiles: ir.Value, rows: ir.Value, ranks: ir.Value
) -> list[ir.Value]:
    """The rows of ``lora_b`` of each part, ``float32 [rank, rows]``, ranks padded to quads.

    Args:
      body: appended to.
      parts: their number.
      tiles: of each part, ``int64 [parts]``.
      rows: likewise.
      ranks: likewise.
    """
    scale = body.get("lora_b_scale")
    if scale is None:
        stored = body.ops("Split", parts, body["lora_b"], body.op("Mul", tiles, ranks), axis=0)
        shapes = _shapes(body, parts, (tiles, ranks), TILE)
        return [
            tile_columns(body, body.op("Reshape", part, shape, allowzero=1))
            for part, shape in zip(stored, shapes, strict=True)
        ]
    width = _width(body)
    chunks = _ceil_div(body, ranks, width.columns(body))
    stored = body.ops("Split", parts, body["lora_b"], body.op("Mul", tiles, chunks), axis=0)
    has_scales = body.op("Min", ranks, body.scalar(1))  # a part of rank 0 has none
    lengths = body.op("Mul", rows, has_scales)
    scales = body.ops("Split", parts, scale, lengths, axis=0)
    missing = body.ops("Split", parts, body.op("Sub", rows, lengths), axis=0, num_outputs=parts)
    shapes = _shapes(body, parts, (tiles, chunks), VECTOR)
    factors = []
    for part, shape, own, absent in zip(stored, shapes, scales, missing, strict=True):
        tiled = body.op("Reshape", part, shape, allowzero=1)
        values = width.values(body, body.op("Unsqueeze", tiled, body.integers(0)))
        filled = body.op("Pad", own, body.op("Concat", body.integers(0), absent, axis=0))
        factors.append(body.op("Mul", body.op("Flatten", values, axis=4), filled))
    return factors


def _shapes(body: Body, parts: int, sizes: tuple[ir.Value, ir.Value], lanes: int) -> list[ir.Value]:
    """``int64 [3]`` for each part: its two ``sizes``, each ``int64 [parts]``, and ``lanes``."""
    first, second = (body.ops("Split", parts, size, axis=0, num_outputs=parts) for size in sizes)
    last = body.integers(lanes)
    return [body.op("Concat", *pair, last, axis=0) for pair in zip(first, second, strict=True)]


def _ceil_div(body: Body, numbers: ir.Value, by: ir.Value) -> ir.Value:
    below = body.op("Sub", by, body.scalar(1))
    return body.op("Div", body.op("Add", numbers, below), by)


def _up_by_part(
    body: Body, down: ir.Value, b: ir.Value, sizes: ir.Value, parts: int, *, axis: int
) -> ir.Value:
    """Up-projections of merged linears: each multiplies its own ranks with its own rows.

    Args:
      body: appended to.
      down: ``[..., parts * rank]``.
      b: transposed up-projections, rows of W along ``axis``.
      sizes: rows of each part.
      parts: their number.
      axis: of the rows of W in ``b``.
    """
    downs = body.ops("Split", parts, down, axis=-1, num_outputs=parts)
    ups = body.ops("Split", parts, b, sizes, axis=axis)
    products = [body.op("MatMul", d, u) for d, u in zip(downs, ups, strict=True)]
    return body.op("Concat", *products, axis=-1)


def add_adapter(body: Body, x: ir.Value, y: ir.Value, parts: int) -> ir.Value:
    """``y`` plus the term of each row's adapter; ``x`` and ``y`` are float32.

    The term is in a branch, so a bank of rank 0 only costs the test.
    """
    columns, rows = body.attribute("K"), body.attribute("N")
    sizes = body.attribute("parts") if parts > 1 else None
    work = body.op("Mul", body.op("Size", body["adapter_a"]), body.op("Size", x))
    then = body.branch(
        "then_branch", lambda: _adapted(body, x, y, parts, columns=columns, rows=rows, sizes=sizes)
    )
    other = body.branch("else_branch", lambda: body.op("Identity", y))
    is_present = body.op("Greater", work, body.scalar(0))
    return body.op("If", is_present, then_branch=then, else_branch=other)


def _adapted(
    body: Body,
    x: ir.Value,
    y: ir.Value,
    parts: int,
    *,
    columns: ir.Value,
    rows: ir.Value,
    sizes: ir.Value | None,
) -> ir.Value:
    """``y`` plus the adapter term; attributes are read outside of the branch."""
    index = body["adapter_index"]
    count = body.op("Shape", index)
    zero = body.op("CastLike", body.scalar(0), index)
    place = body.op("Max", index, zero)  # a row without adapter gets the first, scaled by 0

    def pick(name: str) -> ir.Value:
        return body.op("Gather", body[name], place, axis=0)

    used = body.as_float(body.op("GreaterOrEqual", index, zero))
    used = body.op("Unsqueeze", used, body.integers(1, 2))
    a_scale = body.op("Mul", body.op("Unsqueeze", pick("adapter_a_scale"), body.integers(1)), used)
    if body.get("adapter_b_scale") is None:
        a, b = (_bank_columns(body, pick(name)) for name in ("adapter_a", "adapter_b"))
    else:
        width = _Width.of(body, body["adapter_a"])
        a, b = (
            _bank_values(body, width.values(body, pick(name)), count)
            for name in ("adapter_a", "adapter_b")
        )
    a = body.op("Slice", a, body.integers(0), columns, body.integers(1))
    # One adapter for all rows, or one for each row of the batch.
    shape = body.op("Concat", count, body.integers(-1), columns, axis=0)
    down = body.op("Mul", body.op("MatMul", body.op("Reshape", x, shape), a), a_scale)
    if sizes is None:
        up = body.op("MatMul", down, b)
    else:
        up = _up_by_part(body, down, b, sizes, parts, axis=2)
    if body.get("adapter_b_scale") is not None:
        up = body.op("Mul", up, body.op("Unsqueeze", pick("adapter_b_scale"), body.integers(1)))
    up = body.op("Slice", up, body.integers(0), rows, body.integers(2))
    return body.op("Add", y, body.op("Reshape", up, body.op("Shape", y)))


def _bank_columns(body: Body, tiled: ir.Value) -> ir.Value:
    """Tiles of several adapters, ``[A, tiles, columns, 16]``, to ``float32 [A, columns, rows]``."""
    columns = body.op("Transpose", tiled, perm=[0, 2, 1, 3])
    return body.as_float(body.op("Reshape", columns, body.integers(0, 0, -1)))


def _bank_values(body: Body, values: ir.Value, count: ir.Value) -> ir.Value:
    """Values of ``count`` adapters from :meth:`_Width.values`, ``float32 [A, columns, rows]``."""
    flat = body.op("Flatten", values, axis=4)
    rows = body.op("Shape", flat, start=1, end=2)
    return body.op("Reshape", flat, body.op("Concat", count, body.integers(-1), rows, axis=0))


def _factor(body: Body, name: str) -> ir.Value:
    """A plain low-rank factor as float32, transposed."""
    values = body.as_float(body[name])
    scale = body.get(f"{name}_scale")
    if scale is not None:
        values = body.op("Mul", values, body.op("Unsqueeze", scale, body.integers(1)))
    return body.op("Transpose", values, perm=[1, 0])


def plain_low_rank(body: Body, x: ir.Value) -> ir.Value:
    """``(x lora_a^T) lora_b^T`` from plain factors."""
    return body.op("MatMul", body.op("MatMul", x, _factor(body, "lora_a")), _factor(body, "lora_b"))
