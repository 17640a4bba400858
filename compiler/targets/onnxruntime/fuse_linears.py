"""Fuse the operators around a compressed linear that its kernel can compute.

A kernel that reads its input once can normalise it there, and one that holds its output in
registers can gate it or add to it. Each function looks for one such neighbour and takes it in; what
does not fit is left as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.tensors import register_tensor
from eoracc.plugins.op import DOMAIN, FUSED_OP, Input
from eoracc.plugins.operands.codes import TILE

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["fuse_bias", "fuse_gate", "fuse_norm", "fuse_residual", "same_shape"]


def fuse_bias(graph: ir.Graph) -> None:
    """``Linear(x) + vector`` becomes the linear's bias."""
    for node in [node for node in graph if _is_linear(node)]:
        output = node.outputs[0]
        add = _only_reader(output)
        if add is None or add.op_type != "Add" or _operand(node, Input.bias) is not None:
            continue
        vector = _other_input(add, output)
        if vector is None or vector.const_value is None:
            continue
        if tuple(vector.const_value.shape) != (node.attributes["N"].as_int(),):
            continue
        _set_operand(node, Input.bias, vector)
        _absorb(graph, node, add)


def fuse_gate(graph: ir.Graph) -> None:
    """``act(gate) * up`` of a linear whose halves are gate and up becomes its activation.

    Of a linear that was packed before compression and of one that tiling has merged alike.
    """
    for split in [node for node in graph if node.op_type == "Split" and node.domain == ""]:
        packed = split.inputs[0]
        node = packed.producer() if packed is not None else None
        if node is None or not _is_linear(node) or _only_reader(node.outputs[0]) is not split:
            continue
        found, half = _gate(split), node.attributes["N"].as_int() // 2
        if found is None or half % TILE or split.outputs[0].shape != split.outputs[1].shape:
            continue
        if _is_tiled(node) and tuple(node.attributes.get_ints("parts", ())) != (half, half):
            continue
        activation, nodes = found
        node.attributes["parts"] = ir.AttrInt64s("parts", (half, half))
        node.attributes["activation"] = ir.AttrString("activation", activation)
        _absorb(graph, node, nodes[-1], between=[*reversed(nodes[:-1]), split])


def _gate(split: ir.Node) -> tuple[str, list[ir.Node]] | None:
    """The activation between the outputs of ``split``, and the nodes from it to the product."""
    if len(split.outputs) != 2:
        return None
    gate, up = split.outputs
    product = _only_reader(up)
    if product is None or product.op_type != "Mul":
        return None
    activated = _other_input(product, up)
    last = activated.producer() if activated is not None else None
    if last is None or _only_reader(last.outputs[0]) is not product:
        return None
    if last.op_type == "Gelu" and last.inputs[0] is gate and _only_reader(gate) is last:
        tanh = last.attributes.get_string("approximate", "none") == "tanh"
        return ("gelu_tanh", [last, product]) if tanh else None
    if last.op_type == "Mul" and gate in last.inputs:
        sigmoid = next((use.node for use in gate.uses() if use.node.op_type == "Sigmoid"), None)
        readers = {use.node for use in gate.uses()}
        if sigmoid is not None and readers == {sigmoid, last}:
            alone = _only_reader(sigmoid.outputs[0]) is last
            return ("silu", [sigmoid, last, product]) if alone else None
    return None


def fuse_norm(graph: ir.Graph) -> None:
    """``Linear(RMSNorm(x))`` where nothing else reads the norm becomes the linear's own norm."""
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        node = _only_reader(norm.outputs[0])
        if node is None or not _is_tiled(node) or node.inputs[Input.X] is not norm.outputs[0]:
            continue
        weight = _norm_weight(graph, norm)
        if weight is None or norm.attributes.get_int("axis", -1) != -1:
            continue
        node.replace_input_with(Input.X, norm.inputs[0])
        _set_operand(node, Input.norm_weight, weight)
        epsilon = norm.attributes.get_float("epsilon", 1e-5)
        node.attributes["norm_epsilon"] = ir.AttrFloat32("norm_epsilon", epsilon)
        graph.remove(norm, safe=True)


def _norm_weight(graph: ir.Graph, norm: ir.Node) -> ir.Value | None:
    """The norm's weight as one constant; Gemma's ``weight + 1`` is computed here."""
    weight = norm.inputs[1]
    if weight is None or weight.const_value is not None:
        return weight
    add = weight.producer()
    if add is None or add.op_type != "Add":
        return None
    terms = [value.const_value for value in add.inputs if value is not None]
    if len(terms) != 2 or terms[0] is None or terms[1] is None:
        return None
    total = terms[0].numpy() + terms[1].numpy()
    tensor = ir.tensor(total.astype(np.float32), name=f"{norm.name}.weight")
    return register_tensor(graph, tensor)


def fuse_residual(graph: ir.Graph) -> None:
    """``residual + Linear(x)`` of equal shapes becomes the linear's residual."""
    for node in [node for node in graph if _is_linear(node)]:
        output = node.outputs[0]
        add = _only_reader(output)
        if not _is_tiled(node) or add is None or add.op_type != "Add":
            continue
        residual = _other_input(add, output)
        if residual is None or not same_shape(residual, output):
            continue
        _set_operand(node, Input.residual, residual)
        _absorb(graph, node, add)


def same_shape(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether both have rank 3 and equal dimensions: a fused operand does not broadcast."""
    if left is None or right is None or left.shape is None or right.shape is None:
        return False
    return len(left.shape) == 3 and left.shape == right.shape


# --- the graph ------------------------------------------------------------------------------------


def _is_linear(node: ir.Node) -> bool:
    return (node.domain, node.op_type) == (DOMAIN, FUSED_OP)


def _is_tiled(node: ir.Node) -> bool:
    return _is_linear(node) and node.attributes.get_int("layout", 0) == 1


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The only reader of ``value``; None for several readers or for a graph output."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def _other_input(node: ir.Node, value: ir.Value) -> ir.Value | None:
    left, right = node.inputs
    return right if left is value else left


def _operand(node: ir.Node, position: int) -> ir.Value | None:
    return node.inputs[position] if position < len(node.inputs) else None


def _set_operand(node: ir.Node, position: int, value: ir.Value) -> None:
    if position >= len(node.inputs):
        node.resize_inputs(position + 1)
    node.replace_input_with(position, value)


def _absorb(
    graph: ir.Graph, node: ir.Node, last: ir.Node, *, between: Sequence[ir.Node] = ()
) -> None:
    """Give ``node`` the output of ``last``, and remove ``last`` and the nodes ``between``."""
    replaced, output = last.outputs[0], node.outputs[0]
    name, shape = replaced.name, replaced.shape
    replaced.replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove([last, *between], safe=True)
    output.name, output.shape = name, shape
