"""Bring a float32 decoder graph to float16 or bfloat16.

What multiplies with weights, the attention, the residual stream and the cache take the narrow type.
In float32 stay what is sensitive and costs nothing: norms, tables of cosines and sines, and
arithmetic with constants that are no weights (Gemma's embedding scale, a cap on logits). So the
only constants that are rounded are weights, embedding tables and biases; casts stand where the two
meet. A graph that is cast back to float32 (:mod:`eoracc.runtime.onnxruntime.float32_twin`) computes
with exactly those rounded constants, which the reference model has too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from eoracc.errors import ModelError
from eoracc.passes.graph.tensors import register_tensor
from eoracc.plugins.op import DOMAIN, FUSED_OP

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["HALF", "round_scales", "round_to", "to_half"]

HALF = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
"""The half-precision types by their names in model.yaml."""

_SCALE_PRECISION = 2.0**-8
"""Relative error that a scale may get: that of bfloat16, and of float16 down to 2**-17."""

_FLOAT = ir.DataType.FLOAT
_NORMS = ("LayerNormalization", "RMSNormalization")
_ELEMENTWISE = ("Add", "Div", "Mul", "Neg", "Sub", "Softplus", "Tanh")


def round_to(array: NDArray[Any], dtype: ir.DataType, name: str) -> NDArray[Any]:
    """``array`` in a narrow type, ties to even.

    Args:
      array: of any float type.
      dtype: one of :data:`HALF`.
      name: of what it belongs to, for the message.

    Raises:
      ModelError: a value is too large for it.
    """
    with np.errstate(over="ignore"):
        rounded: NDArray[Any] = array.astype(dtype.numpy())
    if not np.isfinite(rounded).all():
        raise ModelError(
            f"{name} holds {np.abs(array).max():.3g}, which is beyond {dtype.name.lower()}: "
            "choose dtype bfloat16 for this target"
        )
    return rounded


def round_scales(scales: NDArray[Any], dtype: ir.DataType, name: str) -> NDArray[Any]:
    """The scales of a weight in a narrow type, which may be narrower than they are stored in.

    Args:
      scales: float16 or float32.
      dtype: one of :data:`HALF`.
      name: of the linear or table, for the message.

    Raises:
      ModelError: a scale is beyond the range of ``dtype``.
    """
    rounded = round_to(scales, dtype, f"{name}: a scale")
    widened, stored = rounded.astype(np.float32), scales.astype(np.float32)
    lost = np.abs(widened - stored) > _SCALE_PRECISION * np.abs(stored)
    if lost.any():
        raise ModelError(
            f"{name}: a scale of {stored[lost].min():.3g} is beyond the precision of "
            f"{dtype.name.lower()}: choose dtype bfloat16 for this target"
        )
    return rounded


def to_half(graph: ir.Graph, dtype: ir.DataType) -> None:
    """Convert ``graph`` to compute in ``dtype``.

    Args:
      graph: of a decoder, in topological order, changed in place. The inputs and outputs of its
        cache become ``dtype``; logits stay float32. Operands of eoracc's ops are left alone.
      dtype: one of :data:`HALF`.
    """
    for value in graph.inputs:
        if value.dtype == _FLOAT:
            value.type = ir.TensorType(dtype)
    conversion = _Conversion(graph, dtype)
    for node in list(graph):
        conversion.convert(node)
    for position, value in enumerate(graph.outputs):
        if value.name == "logits" and value.dtype == dtype:
            graph.outputs[position] = _as_float32(graph, value)
    for stale in conversion.stale:
        if not stale.uses():
            del graph.initializers[str(stale.name)]


class _Conversion:
    """Visits the nodes in order, so that a value's type is known before it is read."""

    def __init__(self, graph: ir.Graph, dtype: ir.DataType) -> None:
        self._graph, self._dtype = graph, dtype
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self.stale: dict[ir.Value, None] = {}

    def convert(self, node: ir.Node) -> None:
        """Convert the float inputs and outputs of ``node`` to the type that it computes in."""
        if node.op_type == "Cast":
            return
        wanted = _FLOAT if _is_wide(node) else self._dtype
        operands = node.inputs[:1] if node.domain == DOMAIN else node.inputs
        for position, value in enumerate(operands):
            if value is not None and _is_float(value) and value.dtype != wanted:
                node.replace_input_with(position, self._as(value, wanted, before=node))
        for output in node.outputs:
            if _is_float(output):
                output.type = ir.TensorType(wanted)

    def _as(self, value: ir.Value, wanted: ir.DataType, *, before: ir.Node) -> ir.Value:
        if (value, wanted) not in self._made:
            is_constant = value.const_value is not None
            make = self._rounded if is_constant else self._cast
            self._made[value, wanted] = make(value, wanted, before)
        return self._made[value, wanted]

    def _rounded(self, value: ir.Value, wanted: ir.DataType, _: ir.Node) -> ir.Value:
        source = value.const_value
        assert source is not None  # noqa: S101 - the caller has looked
        self.stale[value] = None
        if wanted == ir.DataType.FLOAT16:  # bfloat16 reaches as far as float32
            round_to(source.numpy(), wanted, str(value.name))
        name = f"{value.name}.{wanted.name.lower()}"
        lazy = ir.LazyTensor(
            lambda: ir.tensor(round_to(source.numpy(), wanted, str(value.name)), name=name),
            dtype=wanted,
            shape=ir.Shape(source.shape.numpy()),
            name=name,
        )
        return register_tensor(self._graph, lazy)

    def _cast(self, value: ir.Value, wanted: ir.DataType, before: ir.Node) -> ir.Value:
        cast = ir.node("Cast", [value], {"to": int(wanted)}, name=f"{value.name}/Cast")
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(wanted), value.shape
        self._graph.insert_before(before, cast)
        return cast.outputs[0]


def _is_float(value: ir.Value) -> bool:
    return value.dtype is not None and value.dtype.is_floating_point()


def _is_wide(node: ir.Node) -> bool:
    """Whether ``node`` stays in float32, see the module's docstring."""
    if node.op_type in _NORMS:
        return True
    operands = [value for value in node.inputs if value is not None]
    if node.op_type == "Gather":
        return not str(operands[0].name).endswith(".weight")
    if node.op_type not in _ELEMENTWISE:
        return False
    constants = [value for value in operands if value.const_value is not None]
    if constants:
        return not (node.op_type == "Add" and _is_bias(operands))
    return node.op_type not in ("Add", "Mul") and operands[0].dtype == _FLOAT


def _is_bias(operands: list[ir.Value]) -> bool:
    """The operands of a bias addition: a linear's output and a vector of its width."""
    for value, other in (operands, operands[::-1]):
        producer = value.producer()
        linear = producer is not None and producer.op_type in ("MatMul", FUSED_OP)
        if linear and other.const_value is not None and len(other.const_value.shape) == 1:
            return True
    return False


def _as_float32(graph: ir.Graph, logits: ir.Value) -> ir.Value:
    cast = ir.node("Cast", [logits], {"to": int(_FLOAT)}, name="logits/Cast")
    (output,) = cast.outputs
    output.type, output.shape = ir.TensorType(_FLOAT), logits.shape
    logits.name, output.name = f"logits.{str(logits.dtype).lower()}", "logits"
    graph.append(cast)
    return output
