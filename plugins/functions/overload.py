"""The ops as model-local functions of standard ops, so that an artifact runs in any ONNX Runtime.

A runtime without the native library inlines the function; one that has registered the library
uses its kernel instead. Bodies differ by code width, layout, optional inputs and fusions. Each
variant is an *overload* of the op and has a name of its own
(``bits3_tiles_zeros_lora_norm_parts3``). Sizes are read from the calling node, and values are
computed in float32 whatever the operands' types. With constant operands, the runtime folds the
dequantization of the weight when it loads the model.
"""

from __future__ import annotations

from collections.abc import Iterable, MutableMapping

import onnx_ir as ir

from eoracc.errors import PluginError
from eoracc.plugins.functions.body import OPSET, Body
from eoracc.plugins.functions.ops import BUILDERS
from eoracc.plugins.functions.variant import Variant
from eoracc.plugins.op import ATTRIBUTES, DOMAIN, INPUTS, REQUIRED, TOGETHER

__all__ = ["local_function", "use_local_functions"]


def local_function(node: ir.Node) -> ir.Function:
    """The function that computes ``node``, an op of the ``eoracc`` domain.

    Nodes with equal overloads share one function, whatever their sizes. The caller adds the
    function to the model and names it on the node (``node.overload = function.overload``), or
    leaves both to :func:`use_local_functions`.

    Raises:
      PluginError: the node is of another op, or its inputs or attributes do not fit the op.
    """
    return _build(node.op_type, *_checked(node))


def use_local_functions(
    nodes: Iterable[ir.Node], functions: MutableMapping[ir.OperatorIdentifier, ir.Function]
) -> None:
    """Name the overload on each of ``nodes``, and build those that ``functions`` lacks.

    Raises:
      PluginError: as :func:`local_function`.
    """
    for node in nodes:
        variant, present = _checked(node)
        node.overload = variant.overload(present)
        if node.op_identifier() not in functions:
            functions[node.op_identifier()] = _build(node.op_type, variant, present)


def _build(op_type: str, variant: Variant, present: set[str]) -> ir.Function:
    body = Body(INPUTS[op_type], present)
    output = BUILDERS[op_type](body, variant)
    return ir.Function(
        DOMAIN,
        op_type,
        variant.overload(present),
        graph=ir.Graph(
            body.inputs, [output], nodes=body.nodes, opset_imports={"": OPSET}, name=op_type
        ),
        attributes=[
            ir.Attr(name, ir.AttributeType.UNDEFINED, None)
            for name in ATTRIBUTES[op_type]
            if name not in variant.absent(op_type)
        ],
    )


def _checked(node: ir.Node) -> tuple[Variant, set[str]]:
    """The variant of ``node``, and the names of the inputs that it has."""
    inputs = INPUTS.get(node.op_type)
    if node.domain != DOMAIN or inputs is None:
        raise PluginError(
            f"node {node.name}: {node.domain}::{node.op_type} is no op of the {DOMAIN} domain"
        )
    variant = Variant.of(node)
    if len(node.inputs) > len(inputs):
        raise PluginError(f"node {node.name}: {node.op_type} has at most {len(inputs)} inputs")
    present = {name for name, value in zip(inputs, node.inputs, strict=False) if value is not None}
    if missing := [name for name in inputs[:REQUIRED] if name not in present]:
        raise PluginError(f"node {node.name}: its input {missing[0]} is missing")
    for names in TOGETHER:
        if 0 < len(present & set(names)) < len(names):
            raise PluginError(
                f"node {node.name}: {', '.join(names[:-1])} and {names[-1]} come together or not "
                "at all"
            )
    return variant, present
