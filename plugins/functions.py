"""The ops as model-local functions of standard ops, so that an artifact runs in any ONNX Runtime.

A runtime without the native library inlines the function; one that has registered the library
takes its kernel instead. Bodies differ by the node's code width and layout, by which optional
inputs it has, and by what is fused with it: each variant is an *overload* of the op, named after
what sets it apart (``bits3_tiles_zeros_lora_norm_parts3``). Sizes are read from the calling node,
and values are computed in float32 whatever the operands' types. With constant operands everything
up to the weight that ``X`` is multiplied with is folded when the model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.plugins.operands import BITS, CHUNK, INT8_ZERO, TILE, PluginError

__all__ = ["DOMAIN", "INPUTS", "local_function"]

DOMAIN = "eoracc"

_OPSET = 24

INPUTS: Mapping[str, Sequence[str]] = {
    "MatMulNBitsLowRank": (
        "X",
        "B",
        "scales",
        "zero_points",
        "bias",
        "lora_a",
        "lora_b",
        "lora_a_scale",
        "lora_b_scale",
        "norm_weight",
        "residual",
    ),
    "GatherNBits": ("indices", "B", "scales", "zero_points"),
}
"""Names of each op's inputs, in order."""

_REQUIRED = 3
_ACTIVATIONS = ("silu", "gelu_tanh")
_QUAD = 4
_VECTOR = TILE * _QUAD

_INT, _INTS = ir.AttributeType.INT, ir.AttributeType.INTS
_Attribute = int | str | Sequence[int] | ir.TensorProtocol | ir.Attr

_ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "MatMulNBitsLowRank": (
        "K",
        "N",
        "bits",
        "block_size",
        "accuracy_level",
        "layout",
        "parts",
        "activation",
        "norm_epsilon",
    ),
    "GatherNBits": ("K", "bits", "block_size", "layout"),
}

_OVERLOAD_PARTS = {
    "zero_points": "zeros",
    "bias": "bias",
    "lora_a": "lora",
    "lora_a_scale": "ascale",
    "lora_b_scale": "bscale",
    "norm_weight": "norm",
    "residual": "residual",
}
"""How an optional input shows in the overload's name (``lora_b`` always comes with ``lora_a``)."""


@dataclass(frozen=True)
class _Variant:
    """What sets one body apart from another, beyond its inputs."""

    bits: int
    tiles: bool
    parts: int
    activation: str

    @classmethod
    def of(cls, node: ir.Node) -> _Variant:
        """The variant that ``node``'s attributes ask for, which are checked."""
        where = f"node {node.name}"
        bits = node.attributes["bits"].as_int() if "bits" in node.attributes else None
        if bits not in BITS:
            raise PluginError(f"{where}: bits must be one of {BITS}, not {bits}")
        layout = node.attributes.get_int("layout", 0)
        if layout not in (0, 1):
            raise PluginError(f"{where}: layout must be 0 or 1, not {layout}")
        parts = tuple(node.attributes.get_ints("parts", ()))
        activation = node.attributes.get_string("activation", "")
        if any(size <= 0 or size % TILE for size in parts) or (
            parts and sum(parts) != node.attributes.get_int("N", 0)
        ):
            raise PluginError(f"{where}: parts {parts} are no multiples of {TILE} that add up to N")
        if activation and activation not in _ACTIVATIONS:
            raise PluginError(
                f"{where}: activation must be one of {_ACTIVATIONS}, not {activation}"
            )
        if activation and (len(parts) != 2 or parts[0] != parts[1]):
            raise PluginError(f"{where}: {activation} takes two equal parts, not {parts}")
        fused = parts or activation or any(value is not None for value in node.inputs[9:])
        if fused and not layout:
            raise PluginError(f"{where}: only layout 1 is fused with anything")
        return cls(bits, bool(layout), len(parts), activation)

    def overload(self, present: set[str]) -> str:
        """The overload's name, with the optional inputs that are ``present``."""
        words = [f"bits{self.bits}"]
        if self.tiles:
            words.append("tiles")
        words += [part for name, part in _OVERLOAD_PARTS.items() if name in present]
        if self.parts > 1:
            words.append(f"parts{self.parts}")
        if self.activation:
            words.append(self.activation)
        return "_".join(words)


def local_function(node: ir.Node) -> ir.Function:
    """The function that computes ``node``, a ``MatMulNBitsLowRank`` or ``GatherNBits``.

    Nodes that differ only in sizes share one function: it is the same for equal overloads. The
    caller adds it to the model's functions and names it on the node
    (``node.overload = function.overload``).

    Raises:
      PluginError: the node is of another op, or its inputs or attributes are none that the op has.
    """
    inputs = INPUTS.get(node.op_type)
    if node.domain != DOMAIN or inputs is None:
        raise PluginError(
            f"node {node.name}: {node.domain}::{node.op_type} is no op of the {DOMAIN} domain"
        )
    variant = _Variant.of(node)
    if len(node.inputs) > len(inputs):
        raise PluginError(f"node {node.name}: {node.op_type} has at most {len(inputs)} inputs")
    present = {name for name, value in zip(inputs, node.inputs, strict=False) if value is not None}
    if missing := [name for name in inputs[:_REQUIRED] if name not in present]:
        raise PluginError(f"node {node.name}: its input {missing[0]} is missing")
    if ("lora_a" in present) != ("lora_b" in present):
        raise PluginError(f"node {node.name}: lora_a and lora_b come together or not at all")

    body = _Body(inputs, present)
    output = _BUILDERS[node.op_type](body, variant)
    return ir.Function(
        DOMAIN,
        node.op_type,
        variant.overload(present),
        graph=ir.Graph(
            body.inputs, [output], nodes=body.nodes, opset_imports={"": _OPSET}, name=node.op_type
        ),
        attributes=[
            ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in _ATTRIBUTES[node.op_type]
        ],
    )


class _Body:
    """A function's body while it is written."""

    def __init__(self, inputs: Sequence[str], present: set[str]) -> None:
        self.inputs = [ir.Value(name=name) for name in inputs]
        self.nodes: list[ir.Node] = []
        self._present = {value.name: value for value in self.inputs if value.name in present}

    def get(self, name: str) -> ir.Value | None:
        """The input ``name``, None where the node has none."""
        return self._present.get(name)

    def __getitem__(self, name: str) -> ir.Value:
        """The input ``name``, which is known to be there."""
        return self._present[name]

    def op(self, op_type: str, *inputs: ir.Value, **attributes: _Attribute) -> ir.Value:
        """Append a standard op of one output."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(
        self, op_type: str, count: int, *inputs: ir.Value, **attributes: _Attribute
    ) -> Sequence[ir.Value]:
        """Append a standard op of ``count`` outputs."""
        converted = [
            value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(key, value)
            for key, value in attributes.items()
        ]
        index = len(self.nodes)
        node = ir.Node("", op_type, inputs, converted, num_outputs=count, name=f"{op_type}_{index}")
        self.nodes.append(node)
        for position, value in enumerate(node.outputs):
            value.name = f"v{index}_{position}" if position else f"v{index}"
        return node.outputs

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """A constant tensor."""
        return self.op("Constant", value=ir.tensor(array))

    def integers(self, *values: int) -> ir.Value:
        """A constant ``int64 [len(values)]``."""
        return self.constant(np.array(values, np.int64))

    def attribute(self, name: str) -> ir.Value:
        """The calling node's attribute of one integer or several, ``int64 [its length]``."""
        if name == "parts":
            return self.op("Constant", value_ints=ir.RefAttr("value_ints", name, _INTS))
        return self.op("Reshape", self.scalar(name), self.integers(1))

    def scalar(self, value: int | str) -> ir.Value:
        """A constant, or the calling node's attribute of that name, ``int64 []``."""
        if isinstance(value, int):
            return self.constant(np.array(value, np.int64))
        return self.op("Constant", value_int=ir.RefAttr("value_int", value, _INT))

    def as_float(self, value: ir.Value) -> ir.Value:
        """``value`` as float32."""
        return self.op("Cast", value, to=int(ir.DataType.FLOAT))


def _codes(body: _Body, packed: ir.Value, bits: int) -> ir.Value:
    """``uint8 [rows, G, bytes]`` to the codes, ``uint8 [rows, G, group]``."""
    if bits == 8:
        return packed
    mask = body.constant(np.array(2**bits - 1, np.uint8))
    if bits == 3:
        spread = _spread_three_bits(body, packed)
    else:
        shifts = body.constant(np.arange(0, 8, bits, dtype=np.uint8))
        spread = body.op("Unsqueeze", packed, body.integers(3))
        spread = body.op("BitShift", spread, shifts, direction="RIGHT")
    return body.op("Reshape", body.op("BitwiseAnd", spread, mask), body.integers(0, 0, -1))


def _spread_three_bits(body: _Body, packed: ir.Value) -> ir.Value:
    """``uint8 [rows, G, 3 * runs]`` to ``uint8 [rows, G, runs, 8]``, each code in its low bits.

    Code i of a run begins at bit 3i of three bytes; codes 2 and 5 go on in the next byte.
    """
    byte, shift = np.divmod(3 * np.arange(8), 8)
    straddles = shift > 5
    runs = body.op("Reshape", packed, body.integers(0, 0, -1, 3))
    low = body.op("Gather", runs, body.integers(*byte.tolist()), axis=3)
    low = body.op("BitShift", low, body.constant(shift.astype(np.uint8)), direction="RIGHT")
    high = body.op("Gather", runs, body.integers(*(byte + straddles).tolist()), axis=3)
    high = body.op("BitwiseAnd", high, body.constant(np.where(straddles, 255, 0).astype(np.uint8)))
    left = body.constant(np.where(straddles, 8 - shift, 0).astype(np.uint8))
    return body.op("BitwiseOr", low, body.op("BitShift", high, left, direction="LEFT"))


def _dequantize(
    body: _Body, packed: ir.Value, scales: ir.Value, zero_points: ir.Value | None, bits: int
) -> ir.Value:
    """The rows as ``float32 [rows, K]``."""
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


def _quads(body: _Body, tiled: ir.Value, bits: int, width: int) -> ir.Value:
    """Tiles, ``uint8 [A, chunks, vectors, width]``, to codes, ``[A, chunks, quads, width]``.

    ``width`` is 64, or 4 where one row of a tile has been picked.
    """
    if bits == 8:
        return tiled
    if bits != 3:
        return _spread(body, tiled, bits)
    low, high = body.ops("Split", 2, tiled, body.integers(2, 1), axis=2)
    low = _spread(body, body.op("Unsqueeze", low, body.integers(3)), 2)
    low = body.op("Reshape", low, body.integers(0, 0, 8, width))
    two = body.constant(np.array(2, np.uint8))
    high = body.op("BitShift", _spread(body, high, 1), two, direction="LEFT")
    return body.op("BitwiseOr", low, high)


def _spread(body: _Body, stacked: ir.Value, width: int) -> ir.Value:
    """``uint8 [..., 1, n]`` to each byte's fields of ``width`` bits, ``[..., 8 / width, n]``."""
    shifts = body.constant(np.arange(0, 8, width, dtype=np.uint8)[:, None])
    fields = body.op("BitShift", stacked, shifts, direction="RIGHT")
    return body.op("BitwiseAnd", fields, body.constant(np.array(2**width - 1, np.uint8)))


def _tile_matrix(body: _Body, tiled: ir.Value, bits: int) -> ir.Value:
    """Tiles of codes to the transposed matrix, ``uint8 [columns, rows]``, padding included."""
    vectors = CHUNK[bits] * bits // 8 // _QUAD  # of one chunk
    shape = body.integers(0, 0, vectors, _VECTOR)
    quads = _quads(body, body.op("Reshape", tiled, shape), bits, _VECTOR)
    shape = body.integers(0, 0, CHUNK[bits] // _QUAD, TILE, _QUAD)
    quads = body.op("Reshape", quads, shape)
    return body.op("Flatten", body.op("Transpose", quads, perm=[1, 2, 4, 0, 3]), axis=3)


def _tile_columns(body: _Body, tiled: ir.Value) -> ir.Value:
    """``[tiles, columns, 16]`` to ``float32 [columns, rows]``."""
    rows = body.op("Flatten", body.op("Transpose", tiled, perm=[1, 0, 2]), axis=1)
    return body.as_float(rows)


def _scaled(
    body: _Body,
    codes: ir.Value,
    scales: ir.Value,
    zero_points: ir.Value | None,
    *,
    bits: int,
    axis: int,
) -> ir.Value:
    """Codes as ``float32``, of K columns along ``axis``, from float scales by group there."""
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


def _tiled_weight(body: _Body, bits: int) -> ir.Value:
    """The weight from its tiles, transposed: ``float32 [K, N]``."""
    zero_points = body.get("zero_points")
    values = _scaled(
        body,
        _tile_matrix(body, body["B"], bits),
        _tile_columns(body, body["scales"]),
        None if zero_points is None else _tile_columns(body, zero_points),
        bits=bits,
        axis=0,
    )
    return body.op("Slice", values, body.integers(0), body.attribute("N"), body.integers(1))


def _tiled_factor(body: _Body, name: str) -> ir.Value:
    """A tiled low-rank factor as float32, transposed, padding included."""
    scale = body.get(f"{name}_scale")
    if scale is None:
        return _tile_columns(body, body[name])
    codes = body.as_float(_tile_matrix(body, body[name], 8))
    values = body.op("Sub", codes, body.constant(np.array(INT8_ZERO, np.float32)))
    return body.op("Mul", values, scale)


def _tiled_low_rank(body: _Body, x: ir.Value, parts: int) -> ir.Value:
    """``(x lora_a^T) lora_b^T`` from tiles, each part with its own rows of ``lora_a``."""
    a = _tiled_factor(body, "lora_a")
    a = body.op("Slice", a, body.integers(0), body.attribute("K"), body.integers(0))
    b = _tiled_factor(body, "lora_b")
    b = body.op("Slice", b, body.integers(0), body.attribute("N"), body.integers(1))
    down = body.op("MatMul", x, a)
    if parts > 1:
        sizes = body.attribute("parts")
        downs = body.ops("Split", parts, down, axis=-1, num_outputs=parts)
        ups = body.ops("Split", parts, b, sizes, axis=1)
        products = [body.op("MatMul", d, u) for d, u in zip(downs, ups, strict=True)]
        return body.op("Concat", *products, axis=-1)
    # The rows of A fill up tiles, those of B's transpose at most quads: what is beyond is zero.
    rank = body.op("Shape", b, start=0, end=1)
    down = body.op("Slice", down, body.integers(0), rank, body.integers(-1))
    return body.op("MatMul", down, b)


def _factor(body: _Body, name: str) -> ir.Value:
    """A low-rank factor as float32, transposed."""
    values = body.as_float(body[name])
    scale = body.get(f"{name}_scale")
    if scale is not None:
        values = body.op("Mul", values, body.op("Unsqueeze", scale, body.integers(1)))
    return body.op("Transpose", values, perm=[1, 0])


def _plain_low_rank(body: _Body, x: ir.Value) -> ir.Value:
    return body.op("MatMul", body.op("MatMul", x, _factor(body, "lora_a")), _factor(body, "lora_b"))


def _matmul(body: _Body, variant: _Variant) -> ir.Value:
    bits = variant.bits
    x = body.as_float(body["X"])
    if (norm := body.get("norm_weight")) is not None:
        epsilon = ir.RefAttr("epsilon", "norm_epsilon", ir.AttributeType.FLOAT)
        x = body.op("RMSNormalization", x, body.as_float(norm), axis=-1, epsilon=epsilon)
    if variant.tiles:
        weight = _tiled_weight(body, bits)
    else:
        plain = _dequantize(body, body["B"], body["scales"], body.get("zero_points"), bits)
        weight = body.op("Transpose", plain, perm=[1, 0])
    y = body.op("MatMul", x, weight)
    if body.get("lora_a") is not None:
        low_rank = (
            _tiled_low_rank(body, x, variant.parts) if variant.tiles else _plain_low_rank(body, x)
        )
        y = body.op("Add", y, low_rank)
    if (bias := body.get("bias")) is not None:
        y = body.op("Add", y, body.as_float(bias))
    if variant.activation:
        gate, up = body.ops("Split", 2, y, axis=-1, num_outputs=2)
        if variant.activation == "silu":
            gate = body.op("Mul", gate, body.op("Sigmoid", gate))
        else:
            gate = body.op("Gelu", gate, approximate="tanh")
        y = body.op("Mul", gate, up)
    if (residual := body.get("residual")) is not None:
        y = body.op("Add", y, body.as_float(residual))
    return body.op("CastLike", y, body["X"])


def _gather(body: _Body, variant: _Variant) -> ir.Value:
    indices = body["indices"]
    flat = body.op("Reshape", indices, body.integers(-1))
    values = (_gather_tiled if variant.tiles else _gather_plain)(body, flat, variant.bits)
    shape = body.op("Concat", body.op("Shape", indices), body.attribute("K"), axis=0)
    return body.op("Reshape", values, shape, allowzero=1)


def _gather_plain(body: _Body, flat: ir.Value, bits: int) -> ir.Value:
    zero_points = body.get("zero_points")
    packed, scales = (body.op("Gather", body[name], flat, axis=0) for name in ("B", "scales"))
    if zero_points is not None:
        zero_points = body.op("Gather", zero_points, flat, axis=0)
    return _dequantize(body, packed, scales, zero_points, bits)


def _gather_tiled(body: _Body, flat: ir.Value, bits: int) -> ir.Value:
    """Rows out of tiles: gather each one's tile, then pick the row from it."""
    size = body.scalar(TILE)
    tile = body.op("Div", flat, size)
    row = body.op("Unsqueeze", body.op("Sub", flat, body.op("Mul", tile, size)), body.integers(1))

    def pick(tiles: ir.Value, perm: Sequence[int]) -> ir.Value:
        """From ``[n, ...]``, one tile per index, whose rows ``perm`` moves to the second place."""
        rows_first = body.op("Transpose", tiles, perm=perm)
        return body.op("GatherND", rows_first, row, batch_dims=1)

    def per_group(name: str) -> ir.Value:
        tiles = body.op("Gather", body[name], tile, axis=0)
        return body.as_float(pick(tiles, (0, 2, 1)))

    vectors = CHUNK[bits] * bits // 8 // _QUAD
    packed = body.op("Gather", body["B"], tile, axis=0)
    shape = body.integers(0, 0, vectors, TILE, _QUAD)
    packed = pick(body.op("Reshape", packed, shape), (0, 3, 1, 2, 4))
    codes = body.op("Flatten", _quads(body, packed, bits, _QUAD), axis=1)
    zero_points = None if body.get("zero_points") is None else per_group("zero_points")
    return _scaled(body, codes, per_group("scales"), zero_points, bits=bits, axis=1)


_BUILDERS: Mapping[str, Callable[[_Body, _Variant], ir.Value]] = {
    "MatMulNBitsLowRank": _matmul,
    "GatherNBits": _gather,
}
