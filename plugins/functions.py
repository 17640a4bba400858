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

from eoracc.errors import PluginError
from eoracc.plugins.adapters import ADAPTER_INDEX, ADAPTER_OPERANDS
from eoracc.plugins.operands.codes import BITS, CHUNK, QUAD, TILE, VECTOR

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
        *ADAPTER_OPERANDS,
        ADAPTER_INDEX,
    ),
    "GatherNBits": ("indices", "B", "scales", "zero_points"),
}
"""Names of each op's inputs, in order."""

_REQUIRED = 3
_ACTIVATIONS = ("silu", "gelu_tanh")

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
    "adapter_a": "slot",
    "adapter_b_scale": "slotscale",
}
"""How an optional input shows in the overload's name (others always come with one of these)."""

_TOGETHER = (
    ("lora_a", "lora_b"),
    (*ADAPTER_OPERANDS[:3], ADAPTER_INDEX),
)
"""Optional inputs of which a node has all or none."""


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
    for names in _TOGETHER:
        if 0 < len(present & set(names)) < len(names):
            raise PluginError(
                f"node {node.name}: {', '.join(names[:-1])} and {names[-1]} come together or not "
                "at all"
            )

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
        self._count = 0
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
        index = self._count
        node = ir.Node("", op_type, inputs, converted, num_outputs=count, name=f"{op_type}_{index}")
        self.nodes.append(node)
        self._count += 1
        for position, value in enumerate(node.outputs):
            value.name = f"v{index}_{position}" if position else f"v{index}"
        return node.outputs

    def branch(self, name: str, build: Callable[[], ir.Value]) -> ir.Attr:
        """What ``build`` appends as the branch ``name`` of an ``If``; it may read what is here."""
        outer, self.nodes = self.nodes, []
        output = build()
        graph = ir.Graph([], [output], nodes=self.nodes, name=name)
        self.nodes = outer
        return ir.AttrGraph(name, graph)

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
    vectors = CHUNK[bits] * bits // 8 // QUAD  # of one chunk
    shape = body.integers(0, 0, vectors, VECTOR)
    quads = _quads(body, body.op("Reshape", tiled, shape), bits, VECTOR)
    shape = body.integers(0, 0, CHUNK[bits] // QUAD, TILE, QUAD)
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


@dataclass(frozen=True)
class _Width:
    """Codes of integer factors in tiles, 8 or 4 bits each: which, the shapes tell at run time.

    Attributes:
      shifts: of a byte, for each code in it, ``uint8 [1, 1]`` or ``[2, 1]``.
      mask: of one code, ``uint8 []``.
      zero: code of the value 0, ``float32 []``.
    """

    shifts: ir.Value
    mask: ir.Value
    zero: ir.Value

    @classmethod
    def of(cls, body: _Body, tiled: ir.Value) -> _Width:
        """That of ``tiled [..., chunks, 64]``, tiles of K columns."""
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
    def int8(cls, body: _Body) -> _Width:
        """That of 8-bit codes."""
        return cls(
            body.constant(np.zeros((1, 1), np.uint8)),
            body.constant(np.array(255, np.uint8)),
            body.constant(np.array(128, np.float32)),
        )

    def values(self, body: _Body, tiled: ir.Value) -> ir.Value:
        """``uint8 [A, tiles, chunks, 64]`` to ``float32 [A, chunks, codes, 4, tiles, 16]``.

        ``codes`` are those of a byte: the middle three make up the columns, the last two the rows.
        """
        codes = body.op("Unsqueeze", tiled, body.integers(3))
        codes = body.op("BitShift", codes, self.shifts, direction="RIGHT")
        codes = body.op("BitwiseAnd", codes, self.mask)
        codes = body.op("Reshape", codes, body.integers(0, 0, 0, 0, TILE, QUAD))
        codes = body.op("Transpose", codes, perm=[0, 2, 3, 5, 1, 4])
        return body.op("Sub", body.as_float(codes), self.zero)


def _tiled_factor(body: _Body, name: str) -> ir.Value:
    """A tiled low-rank factor as float32, transposed, padding included."""
    scale = body.get(f"{name}_scale")
    if scale is None:
        return _tile_columns(body, body[name])
    # Both factors are stored alike, and lora_a has K columns to count; int4 is never beside floats.
    is_integer = body.get("lora_a_scale") is not None
    width = _Width.of(body, body["lora_a"]) if is_integer else _Width.int8(body)
    values = width.values(body, body.op("Unsqueeze", body[name], body.integers(0)))
    return body.op("Mul", body.op("Flatten", values, axis=4), scale)


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


def _add_adapter(body: _Body, x: ir.Value, y: ir.Value, parts: int) -> ir.Value:
    """``y`` and what the adapter of each row adds; ``x`` and ``y`` are float32.

    All of it is in a branch: at rank 0 a node costs the test and no more.
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
    body: _Body,
    x: ir.Value,
    y: ir.Value,
    parts: int,
    *,
    columns: ir.Value,
    rows: ir.Value,
    sizes: ir.Value | None,
) -> ir.Value:
    index = body["adapter_index"]
    count = body.op("Shape", index)
    zero = body.op("CastLike", body.scalar(0), index)
    place = body.op("Max", index, zero)  # what it picks for a row without adapter is scaled by 0

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
        downs = body.ops("Split", parts, down, axis=-1, num_outputs=parts)
        ups = body.ops("Split", parts, b, sizes, axis=2)
        products = [body.op("MatMul", d, u) for d, u in zip(downs, ups, strict=True)]
        up = body.op("Concat", *products, axis=-1)
    if body.get("adapter_b_scale") is not None:
        up = body.op("Mul", up, body.op("Unsqueeze", pick("adapter_b_scale"), body.integers(1)))
    up = body.op("Slice", up, body.integers(0), rows, body.integers(2))
    return body.op("Add", y, body.op("Reshape", up, body.op("Shape", y)))


def _bank_columns(body: _Body, tiled: ir.Value) -> ir.Value:
    """Tiles of several adapters, ``[A, tiles, columns, 16]``, to ``float32 [A, columns, rows]``."""
    columns = body.op("Transpose", tiled, perm=[0, 2, 1, 3])
    return body.as_float(body.op("Reshape", columns, body.integers(0, 0, -1)))


def _bank_values(body: _Body, values: ir.Value, count: ir.Value) -> ir.Value:
    """What :meth:`_Width.values` gives of ``count`` adapters to ``float32 [A, columns, rows]``."""
    flat = body.op("Flatten", values, axis=4)
    rows = body.op("Shape", flat, start=1, end=2)
    return body.op("Reshape", flat, body.op("Concat", count, body.integers(-1), rows, axis=0))


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
    if body.get("adapter_a") is not None:
        y = _add_adapter(body, x, y, variant.parts)
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

    vectors = CHUNK[bits] * bits // 8 // QUAD
    packed = body.op("Gather", body["B"], tile, axis=0)
    shape = body.integers(0, 0, vectors, TILE, QUAD)
    packed = pick(body.op("Reshape", packed, shape), (0, 3, 1, 2, 4))
    codes = body.op("Flatten", _quads(body, packed, bits, QUAD), axis=1)
    zero_points = None if body.get("zero_points") is None else per_group("zero_points")
    return _scaled(body, codes, per_group("scales"), zero_points, bits=bits, axis=1)


_BUILDERS: Mapping[str, Callable[[_Body, _Variant], ir.Value]] = {
    "MatMulNBitsLowRank": _matmul,
    "GatherNBits": _gather,
}
