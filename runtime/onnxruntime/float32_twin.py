"""The float32 twin of a float16 or bfloat16 graph: the same nodes and constants, computed widely.

ONNX Runtime has few CPU kernels for the narrow types, and rounding at every node would hide small
mistakes. So a graph that is made for a GPU is checked in this form: every narrow value becomes
float32, every stored number keeps the value that it was rounded to. What is left to differ from a
reference is the rounding of float32.

What a GPU's rounding does can be seen in a second form. It rounds what each node gives to the
narrow type, as kernels do that sum in float32 and store narrow results.
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
"""Operators that compute nothing: what they give needs no rounding."""


def float32_twin(model: ir.Model, *, rounded: bool = False) -> ir.Model:
    """A copy of ``model`` that computes in float32.

    Args:
      model: of standard operators, and of functions of them. It is left as it is. Its tensors are
        shared: narrow ones are widened by a node each, so that what lies in a file stays there.
      rounded: round what each node gives to the type that it has in ``model``.
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
    """Let casts and dequantization give float32 where they gave a narrow type."""
    for node in nodes:
        for name in ("to", "output_dtype"):
            attribute = node.attributes.get(name)
            if attribute is None or attribute.is_ref():  # a function may take it from its caller
                continue
            if attribute.value in _NARROW:
                node.attributes[name] = ir.AttrInt64(name, int(_WIDE))


def _widen(value: ir.Value) -> ir.DataType | None:
    """Make ``value`` float32; the type that it had where that is a narrow one."""
    narrow = value.dtype
    if narrow not in _NARROW:
        return None
    value.type = ir.TensorType(_WIDE)
    return narrow


def _insert(
    graph: ir.Graph, value: ir.Value, dtypes: tuple[ir.DataType, ...], *, after: ir.Node | None
) -> None:
    """Cast ``value`` to one type after the other for all that read it."""
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
