"""The float32 twin of a float16 or bfloat16 graph: the same nodes and constants, computed widely.

ONNX Runtime has few CPU kernels for the narrow types, and rounding at every node would hide small
mistakes. So a graph that is made for a GPU is checked in this form: every narrow value becomes
float32, every stored number keeps the value that it was rounded to. What is left to differ from a
reference is the rounding of float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["float32_twin"]

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_WIDE = ir.DataType.FLOAT


def float32_twin(model: ir.Model) -> ir.Model:
    """A copy of ``model`` that computes in float32.

    Args:
      model: of standard operators. It is left as it is; its wide tensors are shared, the others
        widened whenever they are read.
    """
    twin = model.clone()
    for value in _values(twin.graph):
        if value.dtype in _NARROW:
            value.type = ir.TensorType(_WIDE)
        if value.const_value is not None and value.const_value.dtype in _NARROW:
            value.const_value = _widened(value.const_value)
    for node in twin.graph:
        for name in ("to", "output_dtype"):
            if node.attributes.get_int(name, 0) in _NARROW:
                node.attributes[name] = ir.AttrInt64(name, int(_WIDE))
    return twin


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _widened(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    return ir.LazyTensor(
        lambda: ir.tensor(tensor.numpy().astype(np.float32), name=tensor.name),
        dtype=_WIDE,
        shape=ir.Shape(tensor.shape.numpy()),
        name=tensor.name,
    )
