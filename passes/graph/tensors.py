"""Small additions to onnx_ir that several modules need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx_ir as ir

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["constant", "register_tensor"]


def constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """The initializer ``name``, created from ``array`` if it does not exist."""
    if name in graph.initializers:
        return graph.initializers[name]
    return register_tensor(graph, ir.tensor(array, name=name))


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
