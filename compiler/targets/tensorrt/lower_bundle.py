"""Lowering to TensorRT with the plugin: every compressed linear is one node.

The graph is that of :mod:`eoracc.compiler.targets.tensorrt.lower_graph`. Where TensorRT for RTX has
DequantizeLinear and products, there is ``eoracc::MatMulNBitsLowRank`` as
:mod:`eoracc.plugins.tensorrt.plugin` takes it: codes of any width and zero points as they
are stored, scales and low-rank factors in the type of the graph, and the linear's bias. What that
rounds (nothing of float16 scales and factors in a float16 graph; of integer factors the product
with their scale) :func:`half_product` rounds in the model that the graph is compared with. Ranks
are filled up with zeros to a multiple of 16.

Where the rank is small, the plugin computes the term of low rank in its one launch. Else an
ordinary product, which TensorRT has kernels of its own for, computes the first half of it.

Bytes stand in the graph as INT8, which TensorRT's parser leaves as they are; UINT8 constants it
turns into INT32. Nodes carry the plugin's namespace and version, and each has a function of
standard ops, so that ONNX Runtime computes the same graph.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from eoracc.compiler.targets.tensorrt.dequantize import rounded_product
from eoracc.compiler.targets.tensorrt.half_precision import round_scales, round_to
from eoracc.compiler.targets.tensorrt.lower_graph import AdapterType, Dtype, lower_decoder
from eoracc.compiler.targets.tensorrt.lower_rtx import DequantizeWriter
from eoracc.errors import PassError, PluginError
from eoracc.passes.graph.stored import stored_factors, stored_weight
from eoracc.passes.graph.tensors import constant, register_tensor
from eoracc.plugins.op import DOMAIN, FUSED_OP
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.plugins.tensorrt.function import plugin_function
from eoracc.plugins.tensorrt.kernels import Case, in_one_launch
from eoracc.plugins.tensorrt.plugin import INPUTS, PLUGIN, PLUGIN_VERSION

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["RANK_STEP", "PluginWriter", "half_factors", "half_product", "kernel_cases", "lower"]

RANK_STEP = 16
"""The kernels take ranks that are multiples of this."""

_BIAS = INPUTS.index("bias")


def lower(
    model: ir.Model,
    *,
    dtype: Dtype = "float16",
    adapter_type: AdapterType = "none",
    positions: int | None = None,
) -> ir.Model:
    """Rewrite ``model`` for TensorRT with the plugin.

    Args and errors are those of
    :func:`eoracc.compiler.targets.tensorrt.lower_graph.lower_decoder`.
    """
    lowered = lower_decoder(
        model, PluginWriter, dtype=dtype, adapter_type=adapter_type, positions=positions
    )
    for node in [node for node in lowered.graph if node.domain == DOMAIN]:
        _take_bias(node)
        function = plugin_function(node)
        node.overload = function.overload
        lowered.functions.setdefault(function.identifier(), function)
    return lowered


def half_product(
    name: str, weight: NBitsWeight, factors: LowRank | None, dtype: ir.DataType
) -> NDArray[np.float32]:
    """The weight of a linear of the graph, ``float32 [N, K]``.

    Args:
      name: of the linear, for messages.
      weight: as compression stored it; its scales are rounded.
      factors: of its compensation; their values are rounded.
      dtype: of the graph.
    """
    product = rounded_product(name, weight, None, dtype)
    if factors is not None:
        lora_a, lora_b = half_factors(factors, dtype, name)
        product += lora_b.astype(np.float32) @ lora_a.astype(np.float32)
    return product


def half_factors(
    factors: LowRank, dtype: ir.DataType, name: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """``lora_a [R, K]`` and ``lora_b [N, R]`` of ``dtype``, their own scales multiplied in.

    Raises:
      ModelError: a value is beyond the type; ``name`` is the linear's.
    """
    where = f"{name}: a low-rank factor"
    return round_to(factors.down(), dtype, where), round_to(factors.up(), dtype, where)


class PluginWriter(DequantizeWriter):
    """Writes compressed linears as nodes of the plugin, and tables as for TensorRT for RTX."""

    @override
    def linear(self, tape: ir.tape.Tape, node: ir.Node, x: ir.Value) -> ir.Value:
        """See :class:`eoracc.compiler.targets.tensorrt.lower_graph.LinearWriter`."""
        name = str(node.name)
        weight, factors = stored_weight(node), stored_factors(node)
        operands: dict[str, NDArray[Any] | ir.Value | None] = {
            "weight": weight.packed.view(np.int8),
            "scales": round_scales(weight.scales, self._dtype, name),
            "zero_points": None if weight.zero_points is None else weight.zero_points.view(np.int8),
            "bias": None,
            "lora_a": None,
            "down": None,
            "lora_b": None,
        }
        if factors is not None and factors.rank:
            lora_a, lora_b = half_factors(factors, self._dtype, name)
            missing = -len(lora_a) % RANK_STEP
            lora_a = np.pad(lora_a, ((0, missing), (0, 0)))
            operands["lora_b"] = np.pad(lora_b, ((0, 0), (0, missing)))
            if in_one_launch(len(lora_a)):
                operands["lora_a"] = lora_a
            else:
                down = self._operand(name, "lora_a", np.ascontiguousarray(lora_a.T))
                product = tape.op("MatMul", [x, down], name=f"{name}/down")
                assert x.shape is not None  # noqa: S101 - spec.check has seen it
                product.shape = ir.Shape([*x.shape[:-1], len(lora_a)])
                operands["down"] = product
        return tape.op(
            FUSED_OP,
            [x, *(self._operand(name, part, given) for part, given in operands.items())],
            {
                "K": weight.in_features,
                "N": weight.out_features,
                "bits": weight.bits,
                "block_size": weight.group_size,
                "plugin_namespace": PLUGIN.partition("::")[0],
                "plugin_version": PLUGIN_VERSION,
            },
            domain=DOMAIN,
            name=name,
        )

    def _operand(self, name: str, part: str, given: NDArray[Any] | ir.Value | None) -> ir.Value:
        """An initializer, or the scalar placeholder of an operand that the linear lacks."""
        if isinstance(given, ir.Value):
            return given
        if given is not None:
            return register_tensor(self._graph, ir.tensor(given, name=f"{name}.plugin.{part}"))
        if part == "zero_points":
            return constant(self._graph, "absent.int8", np.zeros((), np.int8))
        kind = self._dtype.name.lower()
        return constant(self._graph, f"absent.{kind}", np.zeros((), self._dtype.numpy()))


def kernel_cases(model: ir.Model) -> list[Case]:
    """The kernels that the plugin's nodes of a lowered graph need, one case for each node.

    Raises:
      PassError: no kernel computes a node; the text says why.
    """
    return [_case(node) for node in model.graph if node.domain == DOMAIN]


def _case(node: ir.Node) -> Case:
    operands = dict(zip(INPUTS, node.inputs, strict=True))
    shapes = {
        name: () if value is None or value.shape is None else tuple(value.shape)
        for name, value in operands.items()
    }
    present = {name: bool(shape) for name, shape in shapes.items()}
    rank = shapes["lora_b"][1] if present["lora_b"] else 0
    assert isinstance(rank, int)  # noqa: S101 - factors are constants
    x = operands["X"]
    assert x is not None and x.dtype is not None  # noqa: PT018, S101 - the node has been checked
    try:
        case = Case(
            dtype="float16" if x.dtype == ir.DataType.FLOAT16 else "bfloat16",
            bits=node.attributes["bits"].as_int(),
            block_size=node.attributes["block_size"].as_int(),
            zero_points=present["zero_points"],
            bias=present["bias"],
            lora_a=present["lora_a"],
            down=present["down"],
            aligned=node.attributes["K"].as_int() % RANK_STEP == 0,
            rank=rank,
        )
        case.variant  # noqa: B018 - is checked when it is made
    except PluginError as error:
        raise PassError(str(node.name), f"is none for the target tensorrt: {error}") from error
    return case


def _take_bias(node: ir.Node) -> None:
    """Move the bias into ``node`` if only the addition of a bias reads its output."""
    (output,) = node.outputs
    uses = output.uses()
    if len(uses) != 1 or output.is_graph_output():
        return
    ((user, position),) = uses
    bias = user.inputs[1 - position] if user.op_type == "Add" else None
    if bias is None or bias.const_value is None or bias.shape != (node.attributes["N"].as_int(),):
        return
    node.replace_input_with(_BIAS, bias)
    graph = node.graph
    assert graph is not None  # noqa: S101 - of a graph that is walked
    ir.convenience.replace_nodes_and_values(graph, node, [user], [], user.outputs, [output])
