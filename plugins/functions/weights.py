"""Codes, scales and zero points of either layout to float32 weights, in standard ops."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from eoracc.plugins.functions.body import Body
from eoracc.plugins.operands.codes import CHUNK, LOW_BITS, QUAD, TILE, VECTOR

__all__ = ["dequantize", "quads_of", "scaled", "tile_columns", "tiled_weight"]


def _codes(body: Body, packed: ir.Value, bits: int) -> ir.Value:
    """``uint8 [rows, G, bytes]`` to the codes, ``uint8 [rows, G, group]``."""
    if bits == 8:
        return packed
    mask = body.constant(np.array(2**bits - 1, np.uint8))
    if bits in LOW_BITS:
        spread = _spread_runs(body, packed, bits)
    else:
        shifts = body.constant(np.arange(0, 8, bits, dtype=np.uint8))
        spread = body.op("Unsqueeze", packed, body.integers(3))
        spread = body.op("BitShift", spread, shifts, direction="RIGHT")
    return body.op("Reshape", body.op("BitwiseAnd", spread, mask), body.integers(0, 0, -1))


def _spread_runs(body: Body, packed: ir.Value, bits: int) -> ir.Value:
    """``uint8 [rows, G, bits * runs]`` to ``uint8 [rows, G, runs, 8]``, each code in its low bits.

    Code i of a run begins at bit ``bits * i`` of ``bits`` bytes; some continue in the next byte.
    """
    byte, shift = np.divmod(bits * np.arange(8), 8)
    straddles = shift > 8 - bits
    runs = body.op("Reshape", packed, body.integers(0, 0, -1, bits))
    low = body.op("Gather", runs, body.integers(*byte.tolist()), axis=3)
    low = body.op("BitShift", low, body.constant(shift.astype(np.uint8)), direction="RIGHT")
    high = body.op("Gather", runs, body.integers(*(byte + straddles).tolist()), axis=3)
    high = body.op("BitwiseAnd", high, body.constant(np.where(straddles, 255, 0).astype(np.uint8)))
    left = body.constant(np.where(straddles, 8 - shift, 0).astype(np.uint8))
    return body.op("BitwiseOr", low, body.op("BitShift", high, left, direction="LEFT"))


def dequantize(
    body: Body, packed: ir.Value, scales: ir.Value, zero_points: ir.Value | None, bits: int
) -> ir.Value:
    """Rows of a weight of the plain layout, ``float32 [rows, K]``."""
    codes = body.as_float(_codes(body, packed, bits))
    if zero_points is None:
        zeros = body.constant(np.array(2 ** (bits - 1), np.float32))
    else:
        zeros = body.op("Unsqueeze", body.as_float(zero_points), body.integers(2))
    steps = body.op("Unsqueeze", body.as_float(scales), body.integers(2))
    values = body.op("Mul", body.op("Sub", codes, zeros), steps)
    rows = body.op("Flatten", values, axis=1)
    # The last group of a row may reach past K.
    return body.op("Slice", rows, body.integers(0), body.attribute("K"), body.integers(1))


def quads_of(body: Body, tiled: ir.Value, bits: int, width: int) -> ir.Value:
    """Tiles, ``uint8 [A, chunks, vectors, width]``, to codes, ``[A, chunks, quads, width]``.

    ``width`` is 64 for whole tiles, and 4 for one row of each.
    """
    if bits == 8:
        return tiled
    if bits not in LOW_BITS:
        return _spread(body, tiled, bits)
    low_bits = LOW_BITS[bits]
    low, high = body.ops("Split", 2, tiled, body.integers(2, 1), axis=2)
    low = _spread(body, body.op("Unsqueeze", low, body.integers(3)), low_bits)
    low = body.op("Reshape", low, body.integers(0, 0, CHUNK[bits] // QUAD, width))
    shift = body.constant(np.array(low_bits, np.uint8))
    high = body.op("BitShift", _spread(body, high, bits - low_bits), shift, direction="LEFT")
    return body.op("BitwiseOr", low, high)


def _spread(body: Body, stacked: ir.Value, width: int) -> ir.Value:
    """``uint8 [..., 1, n]`` to each byte's fields of ``width`` bits, ``[..., 8 / width, n]``."""
    shifts = body.constant(np.arange(0, 8, width, dtype=np.uint8)[:, None])
    fields = body.op("BitShift", stacked, shifts, direction="RIGHT")
    return body.op("BitwiseAnd", fields, body.constant(np.array(2**width - 1, np.uint8)))


def _tile_matrix(body: Body, tiled: ir.Value, bits: int) -> ir.Value:
    """Tiles of codes to the transposed matrix, ``uint8 [columns, rows]``, padding included."""
    vectors = CHUNK[bits] * bits // 8 // QUAD  # of one chunk
    shape = body.integers(0, 0, vectors, VECTOR)
    quads = quads_of(body, body.op("Reshape", tiled, shape), bits, VECTOR)
    shape = body.integers(0, 0, CHUNK[bits] // QUAD, TILE, QUAD)
    quads = body.op("Reshape", quads, shape)
    return body.op("Flatten", body.op("Transpose", quads, perm=[1, 2, 4, 0, 3]), axis=3)


def tile_columns(body: Body, tiled: ir.Value) -> ir.Value:
    """``[tiles, columns, 16]`` to ``float32 [columns, rows]``."""
    rows = body.op("Flatten", body.op("Transpose", tiled, perm=[1, 0, 2]), axis=1)
    return body.as_float(rows)


def scaled(
    body: Body,
    codes: ir.Value,
    scales: ir.Value,
    zero_points: ir.Value | None,
    *,
    bits: int,
    axis: int,
) -> ir.Value:
    """Dequantize codes.

    Args:
      body: appended to.
      codes: ``uint8``, at least K columns along ``axis``.
      scales: ``float32``, one entry per group along ``axis``.
      zero_points: ``float32``, likewise; None for symmetric codes.
      bits: code width.
      axis: 0 or 1.

    Returns:
      ``float32``, K columns along ``axis``.
    """
    column = body.op("Range", body.scalar(0), body.scalar("K"), body.scalar(1))
    group = body.op("Div", column, body.scalar("block_size"))

    def per_column(values: ir.Value) -> ir.Value:
        return body.op("Gather", values, group, axis=axis)

    codes = body.op("Slice", codes, body.integers(0), body.attribute("K"), body.integers(axis))
    if zero_points is None:
        zeros = body.constant(np.array(2 ** (bits - 1), np.float32))
    else:
        zeros = per_column(zero_points)
    steps = body.op("Sub", body.as_float(codes), zeros)
    return body.op("Mul", steps, per_column(scales))


def tiled_weight(body: Body, bits: int) -> ir.Value:
    """The weight of the tiled layout, transposed: ``float32 [K, N]``."""
    zero_points = body.get("zero_points")
    values = scaled(
        body,
        _tile_matrix(body, body["B"], bits),
        tile_columns(body, body["scales"]),
        None if zero_points is None else tile_columns(body, zero_points),
        bits=bits,
        axis=0,
    )
    return body.op("Slice", values, body.integers(0), body.attribute("N"), body.integers(1))
