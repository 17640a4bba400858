"""The operators and operands that a graph may hold at each stage, as data, and checks of them.

:func:`check` checks a whole graph, :func:`check_linears` the nodes of a few linears. Both name the
pass that made a mistake, which would otherwise appear only when a runtime loads the artifact.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

import onnx_ir as ir

from eoracc.errors import PassError
from eoracc.plugins.op import DENSE_OP, DOMAIN, FUSED_OP, GATHER_OP, DenseInput, Input
from eoracc.plugins.operands.codes import BITS, CHUNK, TILE, VECTOR
from eoracc.plugins.tensorrt.plugin import FIELDS as PLUGIN_FIELDS
from eoracc.plugins.tensorrt.plugin import INPUTS as PLUGIN_INPUTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from eoracc.passes.graph.linears import Linear

__all__ = ["OPS", "Stage", "check", "check_linears"]

Op = tuple[str, str]


class Stage(StrEnum):
    """The stages of a graph in the pipeline."""

    FRONTEND = "frontend"
    COMPRESSED = "compressed"
    ONNXRUNTIME = "onnxruntime"
    TENSORRT_RTX = "tensorrt_rtx"
    TENSORRT = "tensorrt"


_ARITHMETIC = ("Add", "Cast", "Clip", "Div", "Exp", "Floor", "Log", "Min", "Mul", "Neg", "Sub")
_MASKS = (
    "And",
    "CumSum",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "Not",
    "Or",
    "ReduceMax",
    "ReduceSum",
    "Where",
)
_SHAPES = (
    "Concat",
    "Expand",
    "Gather",
    "Range",
    "Reshape",
    "Shape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_ACTIVATIONS = ("Gelu", "Relu", "Sigmoid", "Softplus", "Tanh")
_LAYERS = ("Attention", "LayerNormalization", "MatMul", "RMSNormalization", "RotaryEmbedding")

_STANDARD: frozenset[Op] = frozenset(
    ("", name) for name in (*_ARITHMETIC, *_MASKS, *_SHAPES, *_ACTIVATIONS, *_LAYERS)
)
_FUSED: frozenset[Op] = frozenset({(DOMAIN, FUSED_OP), (DOMAIN, GATHER_OP), (DOMAIN, DENSE_OP)})

# The standard operators that TensorRT's parser accepts.
_TENSORRT = _STANDARD | {("", "DequantizeLinear"), ("", "GatherND"), ("", "TensorScatter")}

OPS: Mapping[Stage, frozenset[Op]] = {
    Stage.FRONTEND: _STANDARD,
    Stage.COMPRESSED: _STANDARD | _FUSED,
    Stage.ONNXRUNTIME: _STANDARD
    | _FUSED
    | {
        ("", "Cos"),
        ("", "GatherND"),
        ("", "Max"),
        ("", "Pad"),
        ("", "Sin"),
        ("com.microsoft", "GroupQueryAttention"),
        ("com.microsoft", "SkipSimplifiedLayerNormalization"),
    },
    Stage.TENSORRT_RTX: _TENSORRT,
    Stage.TENSORRT: _TENSORRT | {(DOMAIN, FUSED_OP)},
}
"""The operators, by domain and name, that a graph of each stage may contain."""

_REAL = (ir.DataType.FLOAT16, ir.DataType.FLOAT)
# Of integer factors: plain, and in tiles.
_CODES = (ir.DataType.INT8, ir.DataType.INT4, ir.DataType.UINT8)
_FACTORS = (*_REAL, *_CODES)

_SLOT = tuple(Input)[Input.adapter_a :]
"""The operands of an adapter and the index that picks it."""


def check(model: ir.Model, stage: Stage, *, after: str) -> None:
    """Check that ``model`` is a valid graph of ``stage``.

    Args:
      model: the graph; it is not changed.
      stage: the stage whose operators it may hold.
      after: the pass that produced it, for the message.

    Raises:
      PassError: naming the pass and the node.
    """
    graph = model.graph
    defined: set[ir.Value] = {*graph.inputs, *graph.initializers.values()}
    for node in graph:
        where = _where(node, after)
        _check_operator(node, graph, stage, where)
        for value in node.inputs:
            if value is not None and value not in defined:
                raise PassError(where, f"reads {value.name!r}, which nothing before it defines")
        defined.update(node.outputs)
        _check_operands(node, stage, where)
        if stage in (Stage.ONNXRUNTIME, Stage.TENSORRT) and node.domain == DOMAIN:
            identifier = (node.domain, node.op_type, node.overload)
            if identifier not in model.functions:
                raise PassError(where, "has no function body, so a stock runtime cannot run it")
    for value in graph.outputs:
        if value not in defined:
            raise PassError(f"after {after}", f"output {value.name!r} is not computed")
    for value in graph.initializers.values():
        where = f"after {after}, initializer {value.name}"
        _check_tensor(value, where)
        if not value.uses() and not value.is_graph_output():
            raise PassError(where, "is used by no node")


def check_linears(linears: Iterable[Linear], stage: Stage, *, after: str) -> None:
    """Check the nodes that compute ``linears``, in a time that does not grow with the graph.

    :func:`check` sees more: the order of the nodes, the graph's outputs and unused initializers.

    Args:
      linears: of one graph, a group for example; they are not changed.
      stage: the stage whose operators the graph may hold.
      after: the pass that has just changed them, for the message.

    Raises:
      PassError: naming the pass and the node.
    """
    for linear in linears:
        for node in linear.nodes:
            where = _where(node, after)
            graph = node.graph
            if not isinstance(graph, ir.Graph):
                raise PassError(where, "is not in the graph")
            _check_operator(node, graph, stage, where)
            for value in node.inputs:
                if value is not None:
                    _check_is_defined(value, graph, where)
            _check_operands(node, stage, where)
            for value in node.outputs:
                if not value.uses() and not value.is_graph_output():
                    raise PassError(where, f"nothing reads its output {value.name!r}")


def _where(node: ir.Node, after: str) -> str:
    return f"after {after}, node {node.name or node.op_type}"


def _check_operator(node: ir.Node, graph: ir.Graph, stage: Stage, where: str) -> None:
    if (node.domain, node.op_type) not in OPS[stage]:
        op = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise PassError(where, f"operator {op} is not allowed in a graph of stage {stage.value}")
    if node.domain not in graph.opset_imports:
        raise PassError(where, f"the graph does not import the operators of {node.domain!r}")


def _check_operands(node: ir.Node, stage: Stage, where: str) -> None:
    if node.domain == DOMAIN:
        (_check_plugin if stage is Stage.TENSORRT else _check_fused)(node, where)
    elif node.op_type == "MatMul":
        _check_matmul(node, where)


def _check_is_defined(value: ir.Value, graph: ir.Graph, where: str) -> None:
    """Check that ``graph`` itself holds what defines ``value``."""
    producer = value.producer()
    if producer is not None:
        is_defined = producer.graph is graph
    elif value.is_initializer():
        is_defined = graph.initializers.get(str(value.name)) is value
        _check_tensor(value, f"{where}, initializer {value.name}")
    else:
        is_defined = value.is_graph_input() and value.graph is graph
    if not is_defined:
        raise PassError(where, f"reads {value.name!r}, which the graph does not define")


def _check_tensor(value: ir.Value, where: str) -> None:
    if value.const_value is None:
        raise PassError(where, "holds no tensor")
    # A value that is an input too is a default: a run may give it other sizes.
    fixed = value.shape is not None and not value.is_graph_input()
    if fixed and value.shape != value.const_value.shape:
        raise PassError(where, f"is declared as {value.shape} and holds {value.const_value.shape}")


def _check_fused(node: ir.Node, where: str) -> None:
    if node.op_type == DENSE_OP:
        _check_dense(node, where)
        return
    _check_weight(node, where)
    if node.op_type == FUSED_OP:
        _check_linear(node, where)


def _check_dense(node: ir.Node, where: str) -> None:
    """Check the operands of a linear of floats with low-rank factors."""
    weight, lora_a = (_operand(node, place) for place in (DenseInput.weight, DenseInput.lora_a))
    if weight is None or weight.shape is None or lora_a is None or lora_a.shape is None:
        raise PassError(where, "needs a weight and factors of known shapes")
    columns, rows, rank = weight.shape[0], weight.shape[1], lora_a.shape[0]
    read = _operand(node, DenseInput.X)
    if read is not None and read.shape is not None and read.shape[-1] != columns:
        raise PassError(where, f"reads {read.shape}, whose last dimension is not {columns}")
    _expect(node, DenseInput.weight, (columns, rows), _REAL, where)
    _expect(node, DenseInput.lora_a, (rank, columns), _FACTORS, where)
    _expect(node, DenseInput.lora_b, (rows, rank), _FACTORS, where)
    for place, size in ((DenseInput.lora_a_scale, rank), (DenseInput.lora_b_scale, rows)):
        _expect(node, place, (size,), _REAL, where, optional=True)


def _check_plugin(node: ir.Node, where: str) -> None:
    """Check the operands of TensorRT's plugin: all are present, an unused one is a scalar."""
    columns, rows, bits, group = (node.attributes.get_int(name, 0) for name in PLUGIN_FIELDS)
    if bits not in BITS or group < 8 or group % 8:
        raise PassError(where, f"bits={bits} with block_size={group} is not a stored form")
    operands = dict(zip(PLUGIN_INPUTS, node.inputs, strict=False))
    if missing := [name for name in PLUGIN_INPUTS if operands.get(name) is None]:
        raise PassError(where, f"its input {missing[0]} is missing")
    shapes = {name: value.shape for name, value in operands.items() if value is not None}
    x, lora_b = operands["X"], shapes["lora_b"]
    half = () if x is None or x.dtype is None else (x.dtype,)
    rank = lora_b[1] if lora_b else 0
    groups = -(-columns // group)
    expected: Mapping[str, tuple[int | ir.SymbolicDim, ...]] = {
        "B": (rows, groups, group * bits // 8),
        "scales": (rows, groups),
        "zero_points": (rows, groups),
        "bias": (rows,),
        "lora_a": (rank, columns),
        "lora_b": (rows, rank),
    }
    for position, name in enumerate(PLUGIN_INPUTS):
        if name in expected and (shapes[name] or name in ("B", "scales")):
            is_bytes = name in ("B", "zero_points")
            dtypes = (ir.DataType.INT8,) if is_bytes else half
            _expect(node, position, expected[name], dtypes, where)


def _check_weight(node: ir.Node, where: str) -> None:
    """Check the packed weight, its scales and zero points, which follow the op's first input."""
    columns, bits, group = (
        node.attributes.get_int(name, 0) for name in ("K", "bits", "block_size")
    )
    if bits not in BITS or group < 8 or group % 8:
        raise PassError(where, f"bits={bits} with block_size={group} is not a stored form")
    packed = _operand(node, Input.B)
    stored = None if packed is None or packed.shape is None else packed.shape[0]
    first = stored if isinstance(stored, int) else 0
    groups = -(-columns // group)
    codes: tuple[int, ...]
    if _is_tiled(node):
        tiles = -(-node.attributes.get_int("N", first * TILE) // TILE)
        chunk = CHUNK[bits]
        codes = (tiles, -(-columns // chunk), chunk * bits * TILE // 8)
        per_group: tuple[int, ...] = (tiles, groups, TILE)
    else:
        rows = node.attributes.get_int("N", first)
        codes = (rows, groups, group * bits // 8)
        per_group = (rows, groups)
    _expect(node, Input.B, codes, (ir.DataType.UINT8,), where)
    _expect(node, Input.scales, per_group, _REAL, where)
    _expect(node, Input.zero_points, per_group, (ir.DataType.UINT8,), where, optional=True)


def _is_tiled(node: ir.Node) -> bool:
    return node.attributes.get_int("layout", 0) == 1


def _check_linear(node: ir.Node, where: str) -> None:
    """Check the input, the bias, the low-rank factors and the fused operands."""
    columns, rows = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    read = _operand(node, Input.X)
    if read is not None and read.shape is not None and read.shape[-1] != columns:
        raise PassError(where, f"reads {read.shape}, whose last dimension is not K={columns}")
    _expect(node, Input.bias, (rows,), _REAL, where, optional=True)
    lora_a, lora_b = _operand(node, Input.lora_a), _operand(node, Input.lora_b)
    if (lora_a is None) != (lora_b is None):
        raise PassError(where, "has only one of its two low-rank factors")
    for factor, scale in (
        (Input.lora_a, Input.lora_a_scale),
        (Input.lora_b, Input.lora_b_scale),
    ):
        is_int8 = _operand(node, scale) is not None
        if is_int8 != (_dtype(node, factor) in _CODES):
            raise PassError(
                where, "has an int8 factor without its scale, or a scale without its int8 factor"
            )
    if lora_a is not None and lora_b is not None:
        _check_factors(node, lora_a, lora_b, where)
    _expect(node, Input.norm_weight, (columns,), _REAL, where, optional=True)
    _check_slot(node, where)


def _check_slot(node: ir.Node, where: str) -> None:
    """Check the operands of an adapter and the index that selects it."""
    given = {place for place in _SLOT if _operand(node, place) is not None}
    if not given:
        return
    integers = _dtype(node, Input.adapter_a) == ir.DataType.UINT8
    wanted = set(_SLOT) - (set() if integers else {Input.adapter_b_scale})
    if given != wanted:
        odd = min(place.name for place in given ^ wanted)
        raise PassError(
            where,
            f"has an incomplete set of adapter operands: {odd} is missing or has no counterpart",
        )
    for place in sorted(given):
        value = _operand(node, place)
        if value is not None and not value.is_graph_input():
            raise PassError(where, f"its {place.name} is not an input of the graph")


def _check_factors(node: ir.Node, lora_a: ir.Value, lora_b: ir.Value, where: str) -> None:
    columns, rows = node.attributes.get_int("K", 0), node.attributes.get_int("N", 0)
    if lora_a.shape is None or lora_b.shape is None:
        return
    if not _is_tiled(node):
        rank = lora_a.shape[0]
        _expect(node, Input.lora_a, (rank, columns), _FACTORS, where)
        _expect(node, Input.lora_b, (rows, rank), _FACTORS, where)
        return
    parts = max(len(node.attributes.get_ints("parts", ())), 1)
    a_chunk, b_chunk = _factor_chunk(node, Input.lora_a, columns), 1
    if _dtype(node, Input.lora_b) == ir.DataType.UINT8:
        b_chunk = a_chunk if a_chunk > 1 else CHUNK[8]
    a_dtypes, b_dtypes = (_CODES if chunk > 1 else _REAL for chunk in (a_chunk, b_chunk))
    width = TILE if a_chunk == 1 else VECTOR
    _expect(node, Input.lora_a, (lora_a.shape[0], -(-columns // a_chunk), width), a_dtypes, where)
    width = TILE if b_chunk == 1 else VECTOR
    if "ranks" in node.attributes:
        _check_ranks(node, lora_a, (b_chunk, width), b_dtypes, where)
        return
    ranks = lora_b.shape[1]
    _expect(node, Input.lora_b, (-(-rows // TILE), ranks, width), b_dtypes, where)
    # A chunk may hold padding after the last rank; the tiles of lora_a have the same padding.
    if isinstance(ranks, int) and lora_a.shape[0] != parts * -(-ranks * b_chunk // TILE):
        raise PassError(where, f"{parts} parts of rank {ranks * b_chunk} do not fit {lora_a.shape}")


def _check_ranks(
    node: ir.Node,
    lora_a: ir.Value,
    b_form: tuple[int, int],
    b_dtypes: tuple[ir.DataType, ...],
    where: str,
) -> None:
    """Check factors of parts that each have a rank of their own.

    Args:
      node: the linear.
      lora_a: its tiles, as many as the ranks of each part fill.
      b_form: columns of a chunk of lora_b, and elements of one.
      b_dtypes: types that lora_b may have.
      where: the node's name.
    """
    parts, ranks = (node.attributes.get_ints(name, ()) for name in ("parts", "ranks"))
    if len(parts) != len(ranks):
        raise PassError(where, f"has {len(ranks)} ranks for {len(parts)} parts")
    chunk, width = b_form
    chunks = sum(size // TILE * -(-rank // chunk) for size, rank in zip(parts, ranks, strict=True))
    _expect(node, Input.lora_b, (chunks, width), b_dtypes, where)
    tiles = sum(-(-rank // TILE) for rank in ranks)
    if lora_a.shape is not None and lora_a.shape[0] != tiles:
        raise PassError(where, f"parts of ranks {tuple(ranks)} do not fit {lora_a.shape}")


def _factor_chunk(node: ir.Node, position: int, columns: int) -> int:
    """Columns per chunk of a tiled factor, derived from its shape; 1 for a float factor."""
    if _dtype(node, position) != ir.DataType.UINT8:
        return 1
    value = _operand(node, position)
    chunks = None if value is None or value.shape is None else value.shape[1]
    return CHUNK[4] if chunks == -(-columns // CHUNK[4]) != -(-columns // CHUNK[8]) else CHUNK[8]


def _dtype(node: ir.Node, position: int) -> ir.DataType | None:
    value = _operand(node, position)
    return None if value is None else value.dtype


def _check_matmul(node: ir.Node, where: str) -> None:
    left, right = node.inputs[:2]
    if left is None or right is None or left.shape is None or right.shape is None:
        return
    inner, outer = left.shape[-1], right.shape[0] if len(right.shape) == 2 else None
    if isinstance(inner, int) and isinstance(outer, int) and inner != outer:
        raise PassError(where, f"multiplies {left.shape} with {right.shape}")


def _operand(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _expect(
    node: ir.Node,
    position: int,
    shape: tuple[int | ir.SymbolicDim, ...],
    dtypes: tuple[ir.DataType, ...],
    where: str,
    *,
    optional: bool = False,
) -> None:
    value = _operand(node, position)
    if value is None:
        if optional:
            return
        raise PassError(where, f"input {position} is missing")
    if value.shape is not None and tuple(value.shape) != shape:
        raise PassError(where, f"input {value.name!r} has shape {value.shape}, not {shape}")
    if value.dtype is not None and value.dtype not in dtypes:
        names = " or ".join(dtype.name for dtype in dtypes)
        raise PassError(where, f"input {value.name!r} is {value.dtype.name}, not {names}")
