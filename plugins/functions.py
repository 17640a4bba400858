"""The ops as model-local functions of standard ops, so that an artifact runs in any ONNX Runtime.

A runtime without the native library inlines the function; one that has registered the library
takes its kernel instead. Bodies differ by the node's code width and by which optional inputs it
has: each variant is an *overload* of the op, named after what sets it apart
(``bits3_zeros_lora``). ``K`` is read from the calling node, and values are computed in float32
whatever the operands' types.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.plugins.operands import BITS, PluginError

__all__ = ["DOMAIN", "local_function"]

DOMAIN = "eoracc"

_OPSET = 24

_INPUTS: Mapping[str, Sequence[str]] = {
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
    ),
    "GatherNBits": ("indices", "B", "scales", "zero_points"),
}
_REQUIRED = 3

_ATTRIBUTES: Mapping[str, Sequence[str]] = {
    "MatMulNBitsLowRank": ("K", "N", "bits", "block_size", "accuracy_level"),
    "GatherNBits": ("K", "bits", "block_size"),
}

_OVERLOAD_PARTS = {
    "zero_points": "zeros",
    "bias": "bias",
    "lora_a": "lora",
    "lora_a_scale": "ascale",
    "lora_b_scale": "bscale",
}
"""How an optional input shows in the overload's name (``lora_b`` always comes with ``lora_a``)."""


def local_function(node: ir.Node) -> ir.Function:
    """The function that computes ``node``, a ``MatMulNBitsLowRank`` or ``GatherNBits``.

    Nodes that differ only in sizes share one function: it is the same for equal overloads. The
    caller adds it to the model's functions and names it on the node
    (``node.overload = function.overload``).

    Raises:
      PluginError: the node is of another op, or its inputs or attributes are none that the op has.
    """
    inputs = _INPUTS.get(node.op_type)
    if node.domain != DOMAIN or inputs is None:
        raise PluginError(
            f"node {node.name}: {node.domain}::{node.op_type} is no op of the {DOMAIN} domain"
        )
    bits = node.attributes["bits"].as_int() if "bits" in node.attributes else None
    if bits not in BITS:
        raise PluginError(f"node {node.name}: bits must be one of {BITS}, not {bits}")
    if len(node.inputs) > len(inputs):
        raise PluginError(f"node {node.name}: {node.op_type} has at most {len(inputs)} inputs")
    present = {name for name, value in zip(inputs, node.inputs, strict=False) if value is not None}
    if missing := [name for name in inputs[:_REQUIRED] if name not in present]:
        raise PluginError(f"node {node.name}: its input {missing[0]} is missing")
    if ("lora_a" in present) != ("lora_b" in present):
        raise PluginError(f"node {node.name}: lora_a and lora_b come together or not at all")

    body = _Body(inputs, present)
    output = _BUILDERS[node.op_type](body, bits)
    parts = [f"bits{bits}", *(part for name, part in _OVERLOAD_PARTS.items() if name in present)]
    return ir.Function(
        DOMAIN,
        node.op_type,
        "_".join(parts),
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

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        **attributes: int | str | Sequence[int] | ir.TensorProtocol | ir.Attr,
    ) -> ir.Value:
        """Append a standard op."""
        converted = [
            value if isinstance(value, ir.Attr) else ir.convenience.convert_attribute(key, value)
            for key, value in attributes.items()
        ]
        node = ir.Node("", op_type, inputs, converted, name=f"{op_type}_{len(self.nodes)}")
        self.nodes.append(node)
        value = node.outputs[0]
        value.name = f"v{len(self.nodes)}"
        return value

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """A constant tensor."""
        return self.op("Constant", value=ir.tensor(array))

    def integers(self, *values: int) -> ir.Value:
        """A constant ``int64 [len(values)]``."""
        return self.constant(np.array(values, np.int64))

    def attribute(self, name: str) -> ir.Value:
        """The calling node's integer attribute, ``int64 [1]``."""
        value = self.op("Constant", value_int=ir.RefAttr("value_int", name, ir.AttributeType.INT))
        return self.op("Reshape", value, self.integers(1))

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


def _factor(body: _Body, name: str) -> ir.Value:
    """A low-rank factor as float32, transposed."""
    values = body.as_float(body[name])
    scale = body.get(f"{name}_scale")
    if scale is not None:
        values = body.op("Mul", values, body.op("Unsqueeze", scale, body.integers(1)))
    return body.op("Transpose", values, perm=[1, 0])


def _matmul(body: _Body, bits: int) -> ir.Value:
    weight = _dequantize(body, body["B"], body["scales"], body.get("zero_points"), bits)
    x = body.as_float(body["X"])
    y = body.op("MatMul", x, body.op("Transpose", weight, perm=[1, 0]))
    if body.get("lora_a") is not None:
        down = body.op("MatMul", x, _factor(body, "lora_a"))
        y = body.op("Add", y, body.op("MatMul", down, _factor(body, "lora_b")))
    bias = body.get("bias")
    if bias is not None:
        y = body.op("Add", y, body.as_float(bias))
    return body.op("CastLike", y, body["X"])


def _gather(body: _Body, bits: int) -> ir.Value:
    indices = body["indices"]
    flat = body.op("Reshape", indices, body.integers(-1))

    def rows(name: str) -> ir.Value | None:
        table = body.get(name)
        return None if table is None else body.op("Gather", table, flat, axis=0)

    packed, scales = rows("B"), rows("scales")
    assert packed is not None  # noqa: S101 - local_function has checked both
    assert scales is not None  # noqa: S101
    values = _dequantize(body, packed, scales, rows("zero_points"), bits)
    shape = body.op("Concat", body.op("Shape", indices), body.attribute("K"), axis=0)
    return body.op("Reshape", values, shape)


_BUILDERS: Mapping[str, Callable[[_Body, int], ir.Value]] = {
    "MatMulNBitsLowRank": _matmul,
    "GatherNBits": _gather,
}
