"""What a graph does to the outputs of its head before they are logits: scales, biases, caps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.graph.linears import Linear

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["LogitSteps"]

_Float = NDArray[np.float32]

_PASSING = ("Identity", "Cast")
"""Operators that leave values as they are; graphs compute in float32."""


@dataclass(frozen=True, eq=False)
class LogitSteps:
    """The elementwise operators between a head and the logits of its graph.

    Attributes:
      steps: ``Mul``, ``Div`` or ``Add`` with a constant, one value or one for each entry of the
        vocabulary; ``Tanh`` with None.
    """

    steps: tuple[tuple[str, _Float | None], ...]

    @classmethod
    def of(cls, head: Linear) -> LogitSteps | None:
        """Those behind ``head``; None where they are others, or several nodes read its output."""
        steps: list[tuple[str, _Float | None]] = []
        (value,) = head.node.outputs
        while not value.is_graph_output():
            uses = list(value.uses())
            if len(uses) != 1:
                return None
            node, place = uses[0].node, uses[0].idx
            kind, constant = node.op_type, _constant(node, place)
            known = kind in ("Mul", "Add") or (kind == "Div" and place == 0)
            if kind == "Tanh":
                steps.append((kind, None))
            elif known and constant is not None:
                steps.append((kind, constant))
            elif kind not in _PASSING:
                return None
            (value,) = node.outputs
        return cls(tuple(steps))

    def __call__(self, outputs: _Float) -> tuple[_Float, _Float]:
        """Logits, and the derivative of each by its output of the head.

        Args:
          outputs: of the head, ``float32 [tokens, V]``.

        Returns:
          Both ``float32 [tokens, V]``; the derivatives are broadcast where they are constant.
        """
        slopes: _Float = np.ones((1, 1), np.float32)
        for kind, constant in self.steps:
            if kind == "Tanh":
                outputs = np.tanh(outputs)
                slopes = np.asarray(slopes * (1 - np.square(outputs)), np.float32)
            elif kind == "Add":
                assert constant is not None  # noqa: S101 - of() has read it
                outputs = outputs + constant
            else:
                assert constant is not None  # noqa: S101 - of() has read it
                factor = constant if kind == "Mul" else np.float32(1) / constant
                outputs, slopes = outputs * factor, slopes * factor
        return outputs, np.broadcast_to(slopes, outputs.shape)


def _constant(node: ir.Node, place: int) -> _Float | None:
    """The operand beside the one at ``place``, where it is a constant along the last axis."""
    others = [value for at, value in enumerate(node.inputs) if at != place]
    if len(others) != 1 or others[0] is None or others[0].const_value is None:
        return None
    found = np.asarray(others[0].const_value.numpy(), np.float32)
    if found.size != max(found.shape[-1:], default=1):
        return None
    return found.reshape(-1)
