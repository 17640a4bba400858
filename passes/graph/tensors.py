"""Small additions to onnx_ir that several modules need."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["register_tensor"]


def register_tensor(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Make ``tensor`` an initializer of ``graph`` under its own name."""
    value = ir.Value(
        name=tensor.name,
        const_value=tensor,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
    )
    graph.register_initializer(value)
    return value
