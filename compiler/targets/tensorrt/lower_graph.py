"""The decoder graph that both TensorRT targets share; each target writes its own linears.

The graph is strongly typed: float16 or bfloat16, norms in float32
(:mod:`eoracc.compiler.targets.tensorrt.half_precision`). Its attention has an explicit cache and
one mask (:mod:`eoracc.compiler.targets.tensorrt.explicit_attention`). Logits are those of the
tokens that the input ``logits_positions`` names, and adapters are inputs with a rank that may
change from run to run. docs/targets.md lists the inputs and outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from eoracc import __version__
from eoracc.compiler.targets.onnxruntime.last_logits import head_chain
from eoracc.compiler.targets.tensorrt.explicit_attention import (
    CacheLayout,
    explicit_attention,
)
from eoracc.compiler.targets.tensorrt.half_precision import HALF, round_to, to_half
from eoracc.compiler.targets.tensorrt.position_tables import cut_position_tables
from eoracc.errors import PassError
from eoracc.passes.graph.linears import block_of
from eoracc.passes.graph.tensors import constant, register_tensor
from eoracc.plugins.op import DENSE_OP, DOMAIN, GATHER_OP, Input

__all__ = [
    "LOGITS_POSITIONS",
    "AdapterType",
    "CacheLayout",
    "Dtype",
    "LinearWriter",
    "lower_decoder",
]

Dtype = Literal["float16", "bfloat16"]
AdapterType = Literal["float16", "bfloat16", "none"]

LOGITS_POSITIONS = "logits_positions"
"""Input of the lowered graph, ``int64 [B, L]``: places among a call's tokens that get logits."""

_OPERANDS = 9
"""Number of inputs of a plain linear, its bias included; fused operands follow."""

_IR_VERSION = 11
"""The newest IR version that ONNX Runtime 1.31 reads, which checks the graph."""


class LinearWriter(Protocol):
    """Writes the nodes of a target's compressed linears and tables to a tape."""

    def linear(self, tape: ir.tape.Tape, node: ir.Node, x: ir.Value) -> ir.Value:
        """The output of a ``MatMulNBitsLowRank``, ``[B, S, N]``, without its bias.

        Args:
          tape: for the nodes.
          node: the linear, of plain layout, its operands as compression stored them.
          x: ``[B, S, K]`` in the graph's type.
        """

    def table(self, tape: ir.tape.Tape, node: ir.Node, indices: ir.Value) -> ir.Value:
        """Rows of a ``GatherNBits`` of plain layout, ``[B, S, K]``, for ``indices [B, S]``."""


def lower_decoder(
    model: ir.Model,
    writer: Callable[[ir.Graph, ir.DataType], LinearWriter],
    *,
    dtype: Dtype = "float16",
    adapter_type: AdapterType = "none",
    cache: CacheLayout = "concat",
    capacity: int | None = None,
    positions: int | None = None,
) -> ir.Model:
    """Rewrite ``model`` for TensorRT.

    Args:
      model: as the frontend built it, compressed or not. It is left as it is.
      writer: from the new graph and its type, how compressed linears are computed in it.
      dtype: of weights, activations and cache.
      adapter_type: ``dtype`` where adapters are inputs, else ``none``.
      cache: see :data:`CacheLayout`.
      capacity: tokens that each row of a cache in place has room for.
      positions: tokens that a row may have, beyond which tables by position are cut off; None
        keeps them as they are.

    Returns:
      A new graph that shares the tensors of what is not compressed.

    Raises:
      PassError: it holds what TensorRT does not take.
      ValueError: options that contradict one another.
    """
    if (cache == "in_place") != (capacity is not None):
        raise ValueError("an in-place cache needs a capacity, and only that one takes a capacity")
    if adapter_type not in ("none", dtype):
        raise ValueError(f"adapters of a {dtype} graph are {dtype}, not {adapter_type}")
    half = HALF[dtype]
    lowered = model.clone()
    graph = lowered.graph
    for node in graph:
        if (node.domain, node.op_type) == (DOMAIN, DENSE_OP):
            raise PassError(
                f"node {node.name}",
                "has low-rank factors beside a weight of floats, which engines do not take: put a "
                "quantize pass behind the pruning pass, or take the compensation away",
            )
    explicit_attention(graph, mask_dtype=half, cache=cache, capacity=capacity)
    _gather_logits(graph)
    if positions is not None:
        cut_position_tables(graph, positions)
    common.RemoveUnusedNodesPass()(lowered)
    graph.sort()
    to_half(graph, half)
    _write_linears(graph, writer(graph, half), half, adapters=adapter_type != "none")
    common.RemoveUnusedNodesPass()(lowered)
    for node in graph:
        node.metadata_props.clear()
    for domain in set(graph.opset_imports) - {node.domain for node in graph}:
        del graph.opset_imports[domain]
    lowered.ir_version = _IR_VERSION
    lowered.producer_name, lowered.producer_version = "eoracc", __version__
    return lowered


def _gather_logits(graph: ir.Graph) -> None:
    """Compute the head, and the norm before it, only for the tokens that an input selects."""
    places = ir.Value(
        name=LOGITS_POSITIONS,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(["batch", "logits"]),
    )
    chain = head_chain(graph)
    if not chain:
        raise PassError(
            "logits",
            "are no linear of what a norm gives, so that no head can be computed for single "
            "tokens: take the target out of 'targets'",
        )
    graph.inputs.append(places)
    norm = chain[0]
    tape = ir.tape.Tape()
    last = constant(graph, "logits.place", np.array([2], np.int64))
    indices = tape.op("Unsqueeze", [places, last])
    kept = tape.op("GatherND", [norm.inputs[0], indices], {"batch_dims": 1}, name="logits.hidden")
    source = norm.inputs[0]
    assert source is not None and source.shape is not None  # noqa: PT018, S101 - spec.check
    kept.type = source.type
    kept.shape = ir.Shape(["batch", "logits", source.shape[2]])
    graph.insert_before(norm, tape.nodes)
    norm.replace_input_with(0, kept)
    for node in chain:
        output = node.outputs[0]
        if output.shape is not None and len(output.shape) == 3:
            output.shape = ir.Shape(["batch", "logits", output.shape[2]])


def _write_linears(
    graph: ir.Graph, writer: LinearWriter, dtype: ir.DataType, *, adapters: bool
) -> None:
    for node in [node for node in graph if node.domain == DOMAIN]:
        if node.attributes.get_int("layout", 0) or len(node.inputs) > _OPERANDS:
            raise PassError(f"node {node.name}", "is tiled or fused: lower the compressed graph")
        tape = ir.tape.Tape()
        read = node.inputs[0]
        assert read is not None  # noqa: S101 - spec.check has seen it
        if node.op_type == GATHER_OP:
            result = writer.table(tape, node, read)
        else:
            result = writer.linear(tape, node, read)
            bias = node.inputs[Input.bias] if len(node.inputs) > Input.bias else None
            if bias is not None and bias.const_value is not None:
                rounded = round_to(bias.const_value.numpy(), dtype, str(bias.name))
                name = f"{bias.name}.{dtype.name.lower()}"
                vector = register_tensor(graph, ir.tensor(rounded, name=name))
                result = tape.op("Add", [result, vector], name=f"{node.name}/bias")
            if adapters and block_of(str(node.name)) is not None:
                result = _add_adapter(graph, tape, node, result, dtype)
        for made in tape.nodes:
            for output in made.outputs:
                output.type = output.type or ir.TensorType(dtype)
        ir.convenience.replace_nodes_and_values(
            graph, node, [node], tape.nodes, node.outputs, [result]
        )
        _drop_unused(graph, node)


def _add_adapter(
    graph: ir.Graph, tape: ir.tape.Tape, node: ir.Node, y: ir.Value, dtype: ir.DataType
) -> ir.Value:
    """``y + (x lora_a^T) lora_b^T`` with factors as graph inputs, named and shaped as in PEFT."""
    columns, rows = (node.attributes[name].as_int() for name in ("K", "N"))
    product = node.inputs[0]
    for factor, shape in (("lora_a", ("rank", columns)), ("lora_b", (rows, "rank"))):
        value = ir.Value(
            name=f"{node.name}.{factor}", type=ir.TensorType(dtype), shape=ir.Shape(shape)
        )
        graph.inputs.append(value)
        transposed = tape.op("Transpose", [value], {"perm": [1, 0]})
        product = tape.op("MatMul", [product, transposed], name=f"{node.name}/{factor}_adapter")
    return tape.op("Add", [y, product], name=f"{node.name}/adapter")


def _drop_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove the operands of a removed ``node`` from ``graph``."""
    for value in node.inputs[1:]:
        if value is not None and not value.uses():
            graph.initializers.pop(str(value.name), None)
