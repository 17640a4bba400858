"""Store constants in the narrowest type that holds each of their values.

Zero points of codes of up to four bits take half a byte, not one. Scales of integer factors, which
solvers round to float16, and weights of norms, which checkpoints store in 16 bits, take two bytes,
not four. A ``Cast`` gives the nodes what they read. A runtime folds it when it loads the model, so
a call reads the same constants as before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from eoracc.plugins.op import DOMAIN, FUSED_OP, Input
from eoracc.plugins.operands.weight import NIBBLE, zero_point_bits

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

__all__ = ["narrow_constants"]

_SMALLEST_VECTOR = 1 << 10
"""Bytes of a float32 vector that is worth the node that widens it, which takes some 200."""

_LARGEST = 2**NIBBLE - 1
"""The largest zero point that half a byte holds."""

_FACTOR_SCALES = (Input.lora_a_scale, Input.lora_b_scale)

_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def narrow_constants(graph: ir.Graph) -> None:
    """Narrow zero points, scales of factors and vectors of ``graph`` that lose nothing by it.

    Matrices stay as they are: a runtime maps them, and a cast would be a copy in its memory.

    Args:
      graph: lowered, with linears and tables in tiles; changed in place.
    """
    tape = ir.tape.Tape()
    for value in list(graph.initializers.values()):
        if value.is_graph_input() or value.is_graph_output() or not value.uses():
            continue
        dtype = _narrowest(value)
        if dtype is not None:
            _store(value, dtype, tape)
    if tape.nodes:
        graph.insert_before(graph[0], tape.nodes)


def _narrowest(value: ir.Value) -> ir.DataType | None:
    """The type that ``value`` is to be stored in; None for its own."""
    tensor = value.const_value
    if tensor is None:
        return None
    if tensor.dtype == ir.DataType.UINT8 and _is_everywhere(_is_zero_points, value):
        return ir.DataType.UINT4 if tensor.numpy().max(initial=0) <= _LARGEST else None
    if tensor.dtype != ir.DataType.FLOAT:
        return None
    if _is_everywhere(_is_factor_scale, value):
        return ir.DataType.FLOAT16 if _holds(ir.DataType.FLOAT16, tensor.numpy()) else None
    if len(tensor.shape) == 1 and tensor.nbytes >= _SMALLEST_VECTOR:
        return next((dtype for dtype in _HALVES if _holds(dtype, tensor.numpy())), None)
    return None


def _is_everywhere(is_operand: Callable[[ir.Node, int], bool], value: ir.Value) -> bool:
    """Whether all readers of ``value``, and the places where they read it, are of one kind."""
    return all(is_operand(use.node, use.idx) for use in value.uses())


def _is_zero_points(node: ir.Node, position: int) -> bool:
    """Whether the input at ``position`` holds zero points that half a byte holds."""
    return (
        node.domain == DOMAIN
        and position == Input.zero_points
        and zero_point_bits(node.attributes["bits"].as_int()) == NIBBLE
    )


def _is_factor_scale(node: ir.Node, position: int) -> bool:
    """Whether the input at ``position`` holds scales of an integer factor, at any size.

    The plan of a build's bytes counts two bytes for each (:attr:`.LowRank.nbytes`).
    """
    return (node.domain, node.op_type) == (DOMAIN, FUSED_OP) and position in _FACTOR_SCALES


def _holds(dtype: ir.DataType, array: NDArray[Any]) -> bool:
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype.numpy())
    return np.array_equal(narrow.astype(array.dtype), array)


def _store(value: ir.Value, dtype: ir.DataType, tape: ir.tape.Tape) -> None:
    """Store ``value`` as ``dtype``; its readers read a cast of it."""
    tensor = value.const_value
    assert tensor is not None  # noqa: S101 - it is an initializer
    readers, wide = list(value.uses()), tensor.dtype
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(dtype.numpy()), name=value.name),
        dtype=dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=value.name,
    )
    value.type = ir.TensorType(dtype)
    widened = tape.op("Cast", [value], {"to": int(wide)})
    widened.name, widened.type, widened.shape = (
        f"{value.name}.wide",
        ir.TensorType(wide),
        value.shape,
    )
    for node, position in readers:
        node.replace_input_with(position, widened)
