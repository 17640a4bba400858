"""pack_projections: one weight matmul where several share an input."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx_ir as ir
from typing_extensions import override

from eoracc.passes.base import LayerPass, ModelPass, register
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.graph.names import PARTS
from eoracc.passes.graph.tensors import register_tensor
from eoracc.passes.survey import SurveyPass

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["PackProjections"]


@register
@dataclass(frozen=True, kw_only=True)
class PackProjections(ModelPass):
    """Join q/k/v and gate/up projections that read the same input into one matmul each.

    One matmul is faster than three, and one pair of low-rank factors then serves all of them.
    The pass must precede the passes that compress. The new linears are ``qkv_proj`` and
    ``gate_up_proj``.

    Options:
      attention: pack q_proj, k_proj and v_proj.
      mlp: pack gate_proj and up_proj.
    """

    name: ClassVar[str] = "pack_projections"
    precedes = (SurveyPass, LayerPass)

    attention: bool = True
    mlp: bool = True

    @override
    def call(self, model: ir.Model) -> None:
        wanted = {"qkv_proj": self.attention, "gate_up_proj": self.mlp}
        modules: dict[str, dict[str, Linear]] = defaultdict(dict)
        for linear in find_linears(model):
            modules[linear.name.rpartition(".")[0]][linear.role] = linear
        for parent, members in modules.items():
            for whole, roles in PARTS.items():
                parts = [members[role] for role in roles if role in members]
                if wanted[whole] and len(parts) == len(roles) and _fits(parts):
                    _pack(model.graph, f"{parent}.{whole}", parts)


def _fits(parts: Sequence[Linear]) -> bool:
    """Whether the parts are uncompressed, share one input, and all or none of them have a bias."""
    return (
        all(part.source is not None and part.compressed is None for part in parts)
        and len({part.input for part in parts}) == 1
        and len({_bias(part) is None for part in parts}) == 1
    )


def _bias(linear: Linear) -> tuple[ir.Node, ir.TensorProtocol] | None:
    """The Add of a stored vector that is the output's only reader, and the vector."""
    uses = list(linear.node.outputs[0].uses())
    if len(uses) != 1 or uses[0].node.op_type != "Add":
        return None
    operand = uses[0].node.inputs[1 - uses[0].idx]
    vector = operand.const_value if operand is not None else None
    return (uses[0].node, vector) if vector is not None and len(vector.shape) == 1 else None


def _pack(graph: ir.Graph, name: str, parts: Sequence[Linear]) -> None:
    """Replace ``parts`` by ``Split(MatMul(x, [in, sum of out]) + bias)``."""
    sizes = [part.out_features for part in parts]
    nodes = [part.node for part in parts]
    biases = [bias for part in parts if (bias := _bias(part)) is not None]
    features = parts[0].node.outputs[0]
    tape = ir.tape.Tape()

    def add(op_type: str, inputs: list[ir.Value | None]) -> ir.Value:
        value = tape.op(op_type, inputs, name=f"{name}/{op_type}")
        value.name, value.type = f"v_{name}.{op_type}", features.type
        if features.shape is not None:
            value.shape = ir.Shape([*features.shape[:-1], sum(sizes)])
        return value

    shape = (parts[0].in_features, sum(sizes))
    weight = ir.LazyTensor(
        _Stack(parts),
        dtype=ir.DataType.FLOAT,
        shape=ir.Shape(shape),
        name=f"{name}.weight_t",
    )
    packed = add("MatMul", [parts[0].input, register_tensor(graph, weight)])
    if biases:
        vector = np.concatenate([vector.numpy() for _, vector in biases])
        packed = add(
            "Add", [packed, register_tensor(graph, ir.tensor(vector, name=f"{name}.bias"))]
        )
    lengths = ir.tensor(np.array(sizes, np.int64), name=f"{name}.sizes")
    split = tape.op_multi_out(
        "Split",
        [packed, register_tensor(graph, lengths)],
        {"axis": -1},
        num_outputs=len(sizes),
        name=f"{name}/Split",
    )
    last = [node for node, _ in biases] or nodes
    replaced = [*nodes, *(node for node, _ in biases)]
    stale = [value for node in replaced for value in node.inputs if value is not None]
    ir.convenience.replace_nodes_and_values(
        graph, nodes[0], replaced, tape.nodes, [node.outputs[0] for node in last], split
    )
    for value in stale:
        if value.is_initializer() and not value.uses():
            graph.initializers.pop(str(value.name), None)


@dataclass(frozen=True)
class _Stack:
    """Concatenates the weights to ``[in, sum of out]`` when it is called."""

    parts: Sequence[Linear]

    def __call__(self) -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([part.weight() for part in self.parts]).T)
