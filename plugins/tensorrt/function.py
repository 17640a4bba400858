"""The plugin's node as a model-local function of standard ops.

TensorRT prefers a registered plugin to the function of the same name; a runtime without the plugin
inlines the function. The same graph therefore also runs in ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from eoracc.errors import PluginError
from eoracc.plugins.functions.overload import local_function
from eoracc.plugins.op import DOMAIN, FUSED_OP
from eoracc.plugins.tensorrt.plugin import FIELDS, INPUTS, PLUGIN

__all__ = ["plugin_function"]

_BYTES = ("B", "zero_points")
_REQUIRED = ("X", "B", "scales")
_ATTRIBUTES = (*FIELDS, "plugin_namespace", "plugin_version")


def plugin_function(node: ir.Node) -> ir.Function:
    """The function that computes ``node``, which has all inputs of the plugin.

    Values are computed in float32 whatever the operands' types. Nodes that differ only in sizes
    share one function: it is the same for equal overloads.

    Raises:
      PluginError: the node is not one of the plugin.
    """
    operands: Mapping[str, ir.Value | None] = dict(zip(INPUTS, node.inputs, strict=False))
    if (node.domain, node.op_type) != (DOMAIN, FUSED_OP) or not all(map(operands.get, INPUTS)):
        raise PluginError(f"node {node.name}: is none of the plugin {PLUGIN}")
    present = {
        name: value if name in _REQUIRED or _rank(value) else None
        for name, value in operands.items()
    }
    if present["down"] is not None:
        present["lora_b"] = None  # the op has no half of the term; _add_projection adds it
    plain = ir.node(
        FUSED_OP,
        [value for name, value in present.items() if name != "down"],
        {name: node.attributes[name] for name in FIELDS},
        domain=DOMAIN,
        name=node.name,
    )
    written = local_function(plain)
    graph, overload = written.graph, f"plugin_{written.overload}"
    inputs = {str(value.name): value for value in graph.inputs}
    inputs["down"] = ir.Value(name="down")
    for name in _BYTES:
        _read_as_unsigned(graph, inputs[name])
    if present["down"] is not None:
        overload += "_down"
        _add_projection(graph, inputs)
    graph.inputs[:] = [inputs[name] for name in INPUTS]
    return ir.Function(
        DOMAIN,
        FUSED_OP,
        overload,
        graph=graph,
        attributes=[ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in _ATTRIBUTES],
    )


def _read_as_unsigned(graph: ir.Graph, value: ir.Value) -> None:
    """Give all readers of signed bytes the unsigned ones of the same bits."""
    uses = list(value.uses())
    if not uses:
        return
    tape = ir.tape.Tape()
    wide = tape.op("Cast", [value], {"to": int(ir.DataType.INT32)})
    mask = tape.op("Constant", [], {"value": ir.tensor(np.array(255, np.int32))})
    low = tape.op("BitwiseAnd", [wide, mask])
    unsigned = tape.op("Cast", [low], {"to": int(ir.DataType.UINT8)})
    _name(tape, f"{value.name}_unsigned")
    for user, position in uses:
        user.replace_input_with(position, unsigned)
    graph.insert_before(next(iter(graph)), list(tape.nodes))


def _add_projection(graph: ir.Graph, inputs: Mapping[str, ir.Value]) -> None:
    """Add ``down lora_b^T`` to the output, before it takes the type of X."""
    (output,) = graph.outputs
    last = output.producer()
    if last is None or last.op_type != "CastLike":
        raise PluginError("the op's function does not end with a cast to the type of X")
    tape = ir.tape.Tape()
    float32 = {"to": int(ir.DataType.FLOAT)}
    down, lora_b = (tape.op("Cast", [inputs[name]], float32) for name in ("down", "lora_b"))
    product = tape.op("MatMul", [down, tape.op("Transpose", [lora_b], {"perm": [1, 0]})])
    total = tape.op("Add", [last.inputs[0], product])
    _name(tape, "low_rank")
    graph.insert_before(last, list(tape.nodes))
    last.replace_input_with(0, total)


def _name(tape: ir.tape.Tape, prefix: str) -> None:
    """Name the outputs of ``tape``: names are unique in a function."""
    for index, node in enumerate(tape.nodes):
        node.outputs[0].name = f"{prefix}_{index}"


def _rank(value: ir.Value | None) -> int:
    """Number of dimensions; an absent operand is a scalar."""
    if value is None or value.shape is None:
        raise PluginError("an operand of the plugin has no known shape")
    return len(value.shape)
