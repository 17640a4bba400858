"""The float32 twin of a float16 or bfloat16 graph: the same nodes and constants in float32.

ONNX Runtime has few CPU kernels for the narrow types, and rounding at every node would hide small
errors. So a graph for a GPU is checked in this form: every narrow value becomes float32, and stored
numbers keep their rounded values. It differs from a reference only by the rounding of float32.

A second form shows the effect of a GPU's rounding. It rounds the result of each node to the narrow
type, like kernels that sum in float32 and store narrow results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["float32_twin"]

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_WIDE = ir.DataType.FLOAT
_SHAPING = ("Concat", "Gather", "GatherND", "Reshape", "Slice", "TensorScatter", "Transpose")
"""Operators that only move values, whose results need no rounding."""


def float32_twin(model: ir.Model, *, rounded: bool = False) -> ir.Model:
    """A copy of ``model`` that computes in float32.

    Args:
      model: of standard operators and functions of them; it is not changed. Its tensors are shared:
        a node widens each narrow one, so that data in a file stays there.
      rounded: round the result of each node to its type in ``model``.
    """
    twin = model.clone()
    graph = twin.graph
    for nodes in (graph, *twin.functions.values()):
        _widen_attributes(nodes)
    for value in graph.inputs:
        _widen(value)
    for node in list(graph):
        for output in node.outputs:
            narrow = _widen(output)
            if rounded and narrow is not None and node.op_type not in _SHAPING:
                _insert(graph, output, (narrow, _WIDE), after=node)
    for value in list(graph.initializers.values()):
        if value.dtype in _NARROW:
            _insert(graph, value, (_WIDE,), after=None)
    return twin


def _widen_attributes(nodes: Iterable[ir.Node]) -> None:
    """Make casts and dequantization to a narrow type give float32."""
    for node in nodes:
        for name in ("to", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is None or attribute.is_ref():  # an attribute of the caller of a function
                continue
            if attribute.value in _NARROW:
                node.attributes[name] = ir.AttrInt64(name, int(_WIDE))


def _widen(value: ir.Value) -> ir.DataType | None:
    """Make a narrow ``value`` float32; returns its former type, or None if it was not narrow."""
    narrow = value.dtype
    if narrow not in _NARROW:
        return None
    value.type = ir.TensorType(_WIDE)
    return narrow


def _insert(
    graph: ir.Graph, value: ir.Value, dtypes: tuple[ir.DataType, ...], *, after: ir.Node | None
) -> None:
    """Insert casts of ``value`` to one type after the other before its readers."""
    readers = list(value.uses())
    result = value
    for position, dtype in enumerate(dtypes):
        cast = ir.node("Cast", [result], {"to": int(dtype)}, name=f"{value.name}/twin_{position}")
        (output,) = cast.outputs
        output.type, output.shape = ir.TensorType(dtype), value.shape
        output.name = f"{value.name}/twin_{position}"
        if after is None:
            graph.insert_before(graph[0], cast)
        else:
            graph.insert_after(after, cast)
        after, result = cast, output
    for node, position in readers:
        node.replace_input_with(position, result)
