"""The bodies of the ops."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from eoracc.plugins.functions.body import Body
from eoracc.plugins.functions.low_rank import (
    add_adapter,
    plain_low_rank,
    ranked_low_rank,
    tiled_low_rank,
)
from eoracc.plugins.functions.variant import Variant
from eoracc.plugins.functions.weights import dequantize, quads_of, scaled, tiled_weight
from eoracc.plugins.op import DENSE_OP, FUSED_OP, GATHER_OP
from eoracc.plugins.operands.codes import CHUNK, QUAD, TILE

__all__ = ["BUILDERS"]


def _matmul(body: Body, variant: Variant) -> ir.Value:
    """``MatMulNBitsLowRank``: the linear, and in this order what is fused with it."""
    bits = variant.bits
    x = body.as_float(body["X"])
    if (norm := body.get("norm_weight")) is not None:
        epsilon = ir.RefAttr("epsilon", "norm_epsilon", ir.AttributeType.FLOAT)
        x = body.op("RMSNormalization", x, body.as_float(norm), axis=-1, epsilon=epsilon)
    if variant.tiles:
        weight = tiled_weight(body, bits)
    else:
        plain = dequantize(body, body["B"], body["scales"], body.get("zero_points"), bits)
        weight = body.op("Transpose", plain, perm=[1, 0])
    y = body.op("MatMul", x, weight)
    if body.get("lora_a") is not None:
        y = body.op("Add", y, _low_rank(body, variant, x))
    if body.get("adapter_a") is not None:
        y = add_adapter(body, x, y, variant.parts)
    if (bias := body.get("bias")) is not None:
        y = body.op("Add", y, body.as_float(bias))
    if variant.activation:
        y = _gated(body, y, variant.activation)
    if (residual := body.get("residual")) is not None:
        y = body.op("Add", y, body.as_float(residual))
    return body.op("CastLike", y, body["X"])


def _low_rank(body: Body, variant: Variant, x: ir.Value) -> ir.Value:
    """The low-rank term that all rows share."""
    if not variant.tiles:
        return plain_low_rank(body, x)
    return (ranked_low_rank if variant.ranks else tiled_low_rank)(body, x, variant.parts)


def _gated(body: Body, y: ir.Value, activation: str) -> ir.Value:
    """``activation(gate) * up`` of the two halves of ``y``."""
    gate, up = body.ops("Split", 2, y, axis=-1, num_outputs=2)
    if activation == "silu":
        gate = body.op("Mul", gate, body.op("Sigmoid", gate))
    else:
        gate = body.op("Gelu", gate, approximate="tanh")
    return body.op("Mul", gate, up)


def _dense(body: Body, variant: Variant) -> ir.Value:
    """``MatMulLowRank``: a product with floats, and the low-rank term."""
    del variant
    x = body.as_float(body["X"])
    y = body.op("MatMul", x, body.as_float(body["weight"]))
    return body.op("CastLike", body.op("Add", y, plain_low_rank(body, x)), body["X"])


def _gather(body: Body, variant: Variant) -> ir.Value:
    """``GatherNBits``: rows of a table."""
    indices = body["indices"]
    flat = body.op("Reshape", indices, body.integers(-1))
    if variant.rows:
        # An index that is no row is an error, not a row that pads a tile; a negative one wraps.
        ends = body.scalar(0), body.scalar("N"), body.scalar(1)
        flat = body.op("Gather", body.op("Range", *ends), flat, axis=0)
    values = (_gather_tiled if variant.tiles else _gather_plain)(body, flat, variant.bits)
    shape = body.op("Concat", body.op("Shape", indices), body.attribute("K"), axis=0)
    return body.op("Reshape", values, shape, allowzero=1)


def _gather_plain(body: Body, flat: ir.Value, bits: int) -> ir.Value:
    """Rows of a plain table: gather their codes, then dequantize."""
    zero_points = body.get("zero_points")
    packed, scales = (body.op("Gather", body[name], flat, axis=0) for name in ("B", "scales"))
    if zero_points is not None:
        zero_points = body.op("Gather", zero_points, flat, axis=0)
    return dequantize(body, packed, scales, zero_points, bits)


def _gather_tiled(body: Body, flat: ir.Value, bits: int) -> ir.Value:
    """Rows of a table in tiles: gather the tile of each, then pick the row from it."""
    size = body.scalar(TILE)
    tile = body.op("Div", flat, size)
    row = body.op("Unsqueeze", body.op("Sub", flat, body.op("Mul", tile, size)), body.integers(1))

    def pick(tiles: ir.Value, perm: Sequence[int]) -> ir.Value:
        """One row of each tile in ``[n, ...]``; ``perm`` moves the rows to the second axis."""
        rows_first = body.op("Transpose", tiles, perm=perm)
        return body.op("GatherND", rows_first, row, batch_dims=1)

    def per_group(name: str) -> ir.Value:
        tiles = body.op("Gather", body[name], tile, axis=0)
        return body.as_float(pick(tiles, (0, 2, 1)))

    vectors = CHUNK[bits] * bits // 8 // QUAD
    packed = body.op("Gather", body["B"], tile, axis=0)
    shape = body.integers(0, 0, vectors, TILE, QUAD)
    packed = pick(body.op("Reshape", packed, shape), (0, 3, 1, 2, 4))
    codes = body.op("Flatten", quads_of(body, packed, bits, QUAD), axis=1)
    zero_points = None if body.get("zero_points") is None else per_group("zero_points")
    return scaled(body, codes, per_group("scales"), zero_points, bits=bits, axis=1)


BUILDERS: Mapping[str, Callable[[Body, Variant], ir.Value]] = {
    FUSED_OP: _matmul,
    GATHER_OP: _gather,
    DENSE_OP: _dense,
}
"""Appends the body of an op and returns its output."""
