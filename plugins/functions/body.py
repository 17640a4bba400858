"""Builds the body of a function: its inputs, and the standard ops appended so far."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["OPSET", "Body"]

OPSET = 24

_INT, _INTS = ir.AttributeType.INT, ir.AttributeType.INTS

_Attribute = int | str | Sequence[int] | ir.Tensor[Any] | ir.Attr


class Body:
    """A function's body under construction."""

    def __init__(self, inputs: Sequence[str], present: set[str]) -> None:
        """Begin a body without nodes.

        Args:
          inputs: names of all inputs of the op, in order.
          present: names of those that the node has.
        """
        self.inputs = [ir.Value(name=name) for name in inputs]
        self.nodes: list[ir.Node] = []
        self._count = 0
        self._present = {value.name: value for value in self.inputs if value.name in present}

    def get(self, name: str) -> ir.Value | None:
        """The input ``name``; None if the node does not have it."""
        return self._present.get(name)

    def __getitem__(self, name: str) -> ir.Value:
        """The input ``name``, which the node has."""
        return self._present[name]

    def op(self, op_type: str, *inputs: ir.Value, **attributes: _Attribute) -> ir.Value:
        """Append a standard op of one output."""
        return self.ops(op_type, 1, *inputs, **attributes)[0]

    def ops(
        self, op_type: str, count: int, *inputs: ir.Value, **attributes: _Attribute
    ) -> Sequence[ir.Value]:
        """Append a standard op of ``count`` outputs."""
        converted = [_converted(name, value) for name, value in attributes.items()]
        index = self._count
        node = ir.Node("", op_type, inputs, converted, num_outputs=count, name=f"{op_type}_{index}")
        self.nodes.append(node)
        self._count += 1
        for position, value in enumerate(node.outputs):
            value.name = f"v{index}_{position}" if position else f"v{index}"
        return node.outputs

    def branch(self, name: str, build: Callable[[], ir.Value]) -> ir.Attr:
        """The nodes that ``build`` appends, as the branch ``name`` of an ``If``.

        A branch may read the values of this body.
        """
        outer, self.nodes = self.nodes, []
        output = build()
        graph = ir.Graph([], [output], nodes=self.nodes, name=name)
        self.nodes = outer
        return ir.AttrGraph(name, graph)

    def constant(self, array: NDArray[np.generic]) -> ir.Value:
        """A constant tensor."""
        return self.op("Constant", value=ir.Tensor(array))

    def integers(self, *values: int) -> ir.Value:
        """A constant ``int64 [len(values)]``."""
        return self.constant(np.array(values, np.int64))

    def attribute(self, name: str) -> ir.Value:
        """An attribute of the calling node: an integer, ``int64 [1]``, or all of a list."""
        if name in ("parts", "ranks"):
            return self.op("Constant", value_ints=ir.RefAttr("value_ints", name, _INTS))
        return self.op("Reshape", self.scalar(name), self.integers(1))

    def scalar(self, value: int | str) -> ir.Value:
        """A constant, or the attribute ``value`` of the calling node, ``int64 []``."""
        if isinstance(value, int):
            return self.constant(np.array(value, np.int64))
        return self.op("Constant", value_int=ir.RefAttr("value_int", value, _INT))

    def as_float(self, value: ir.Value) -> ir.Value:
        """``value`` as float32."""
        return self.op("Cast", value, to=int(ir.DataType.FLOAT))


def _converted(name: str, value: _Attribute) -> ir.Attr:
    """``value`` as the attribute ``name``.

    ``ir.convenience`` would infer the type by protocols, which takes longer than all else here.
    """
    if isinstance(value, ir.Attr):
        return value
    if isinstance(value, int):
        return ir.AttrInt64(name, value)
    if isinstance(value, str):
        return ir.AttrString(name, value)
    if isinstance(value, ir.Tensor):
        return ir.AttrTensor(name, value)
    return ir.AttrInt64s(name, value)
