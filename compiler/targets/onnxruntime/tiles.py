"""Store compressed linears and tables in the kernels' order; linears of one input share a node.

Plain operands (``layout`` 0) become tiles (``layout`` 1, :mod:`eoracc.plugins.operands.codes`).
Linears that read one value and belong together (q/k/v, gate/up, or the first factors of such
weights) become one node of several parts with concatenated rows: activations are then normalised
and quantized once, and one pass over the threads computes all parts.

Tiles are made when the model is written, one operand at a time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from eoracc.compiler.targets.onnxruntime.factor_tiles import (
    INTEGERS,
    factor_operands,
    own_ranks,
)
from eoracc.passes.graph.names import PARTS
from eoracc.passes.graph.stored import constant_operand
from eoracc.passes.graph.tensors import register_tensor
from eoracc.plugins.op import DOMAIN, FACTORS, FUSED_OP, GATHER_OP, Input
from eoracc.plugins.operands.codes import CHUNK, TILE, tile_codes, tile_rows, unpack_codes
from eoracc.runtime.artifact.graph_names import LINEARS_KEY

__all__ = ["tile_operands"]

_Convert = Callable[[NDArray[Any]], NDArray[Any]]


def tile_operands(graph: ir.Graph, *, accuracy_level: int) -> None:
    """Store every compressed linear and table of ``graph`` in tiles, merged where possible.

    A node whose operands are not all constant (factors that a caller sets) stays as it is.

    Args:
      graph: changed in place.
      accuracy_level: for every linear, see docs/op.md.
    """
    store = _Store(graph)
    for group in _groups(graph):
        _replace(graph, store, group, accuracy_level)
    for node in [node for node in graph if _is_plain(node, GATHER_OP)]:
        _tile_table(store, node)
    for value in store.stale:
        if not value.uses():
            graph.initializers.pop(str(value.name), None)


def _is_plain(node: ir.Node, op_type: str) -> bool:
    return (
        (node.domain, node.op_type) == (DOMAIN, op_type)
        and node.attributes.get_int("layout", 0) == 0
        and all(value is None or value.const_value is not None for value in node.inputs[1:])
    )


# --- merged nodes ---------------------------------------------------------------------------------


def _groups(graph: ir.Graph) -> list[tuple[ir.Node, ...]]:
    """The linears that become one node each, parts in order; a group may be one linear."""
    nodes = [node for node in graph if _is_plain(node, FUSED_OP)]
    modules: dict[tuple[str, str], dict[str, ir.Node]] = defaultdict(dict)
    for node in nodes:
        parent, role, factor = _place(node)
        modules[parent, factor][role] = node
    groups: list[tuple[ir.Node, ...]] = []
    for members in modules.values():
        for roles in PARTS.values():
            parts = tuple(members[role] for role in roles if role in members)
            if len(parts) == len(roles) and _fit_together(parts):
                groups.append(parts)
    merged = {node for group in groups for node in group}
    return groups + [(node,) for node in nodes if node not in merged]


def _place(node: ir.Node) -> tuple[str, str, str]:
    """Module and role of a linear's weight, and ``.v`` for its first factor, else an empty string.

    Second factors are never merged: each reads another value.
    """
    whole, _, role = str(node.name).rpartition(".")
    if role != "v":
        return whole, role, ""
    parent, _, role = whole.rpartition(".")
    return parent, role, ".v"


def _fit_together(nodes: Sequence[ir.Node]) -> bool:
    """Whether ``nodes`` read one input, fill whole tiles, and have the same stored form."""
    return (
        len({node.inputs[Input.X] for node in nodes}) == 1
        and all(node.attributes["N"].as_int() % TILE == 0 for node in nodes)
        and len({_form(node) for node in nodes}) == 1
        and len({_factor_form(node) for node in nodes if _has_factors(node)}) <= 1
    )


def _has_factors(node: ir.Node) -> bool:
    return constant_operand(node, Input.lora_a) is not None


def _form(node: ir.Node) -> tuple[Any, ...]:
    scales, zero_points = (
        constant_operand(node, Input.scales),
        constant_operand(node, Input.zero_points),
    )
    assert scales is not None  # noqa: S101 - the op has them
    sizes = (node.attributes[name].as_int() for name in ("bits", "block_size"))
    return (*sizes, scales.dtype, zero_points is None)


def _factor_form(node: ir.Node) -> tuple[Any, ...]:
    """Types of the factors; 8-bit and 4-bit integers can share an operand."""
    factors = (constant_operand(node, Input.lora_a), constant_operand(node, Input.lora_b))
    return tuple(
        None if factor is None else "integer" if factor.dtype in INTEGERS else factor.dtype
        for factor in factors
    )


# --- one node in tiles ----------------------------------------------------------------------------


def _replace(graph: ir.Graph, store: _Store, nodes: Sequence[ir.Node], accuracy_level: int) -> None:
    first = nodes[0]
    name = str(first.name) if len(nodes) == 1 else _merged_name(nodes)
    sizes = [node.attributes["N"].as_int() for node in nodes]
    attributes: dict[str, Any] = {
        "K": first.attributes["K"].as_int(),
        "N": sum(sizes),
        "bits": first.attributes["bits"].as_int(),
        "block_size": first.attributes["block_size"].as_int(),
        "accuracy_level": accuracy_level,
        "layout": 1,
    }
    if len(nodes) > 1:
        attributes["parts"] = sizes
        if ranks := own_ranks(nodes):
            attributes["ranks"] = ranks
    elif "activation" in first.attributes:  # packed before compression and gated
        attributes |= {name: first.attributes[name].value for name in ("parts", "activation")}
    operands = [first.inputs[Input.X], *store.weight(nodes, name), store.bias(nodes, name)]
    operands += store.factors(nodes, name)
    while operands[-1] is None:
        operands.pop()
    tiled = ir.node(FUSED_OP, operands, attributes, domain=DOMAIN, name=name)
    tiled.metadata_props[LINEARS_KEY] = ",".join(str(node.name) for node in nodes)
    output, old = tiled.outputs[0], first.outputs[0]
    output.name, output.type = f"{name}.output", old.type
    if len(nodes) == 1:
        output.shape = old.shape
    elif old.shape is not None:
        output.shape = ir.Shape([*old.shape[:-1], sum(sizes)])
    new, results = [tiled], [output]
    if len(nodes) > 1:
        lengths = register_tensor(graph, ir.tensor(np.array(sizes, np.int64), name=f"{name}.sizes"))
        split = ir.node(
            "Split", [output, lengths], {"axis": -1}, num_outputs=len(nodes), name=f"{name}/Split"
        )
        new, results = [tiled, split], list(split.outputs)
    ir.convenience.replace_nodes_and_values(
        graph, first, nodes, new, [node.outputs[0] for node in nodes], results
    )


def _merged_name(nodes: Sequence[ir.Node]) -> str:
    places = [_place(node) for node in nodes]
    roles = tuple(role for _, role, _ in places)
    whole = next(whole for whole, parts in PARTS.items() if parts == roles)
    parent, _, factor = places[0]
    return f"{parent}.{whole}{factor}"


def _tile_table(store: _Store, node: ir.Node) -> None:
    for position, value in enumerate(store.weight((node,), str(node.name)), start=Input.B):
        if position < len(node.inputs):
            node.replace_input_with(position, value)
    node.attributes["layout"] = ir.AttrInt64("layout", 1)


@dataclass(eq=False)
class _Store:
    """Tiled operands of a graph; an operand that two nodes share is stored once.

    Attributes:
      graph: where they are registered.
      stale: the plain operands that they replace.
    """

    graph: ir.Graph
    stale: list[ir.Value] = field(default_factory=list)
    _made: dict[tuple[ir.Value, ...], ir.Value] = field(default_factory=dict)

    def weight(self, nodes: Sequence[ir.Node], name: str) -> list[ir.Value | None]:
        """``B``, ``scales`` and ``zero_points`` of ``nodes``, one after the other."""
        first = nodes[0]
        bits, columns = first.attributes["bits"].as_int(), first.attributes["K"].as_int()

        def codes(packed: NDArray[Any]) -> NDArray[Any]:
            return tile_codes(unpack_codes(packed, bits=bits, in_features=columns), bits=bits)

        chunk_bytes = CHUNK[bits] * bits * TILE // 8
        chunks = -(-columns // CHUNK[bits])
        return [
            self._stack(nodes, Input.B, name, codes, (chunks, chunk_bytes), ir.DataType.UINT8),
            self._rows(nodes, Input.scales, name),
            self._rows(nodes, Input.zero_points, name),
        ]

    def bias(self, nodes: Sequence[ir.Node], name: str) -> ir.Value | None:
        """The biases of ``nodes`` as one vector; zeros for a node that has none."""
        tensors = [constant_operand(node, Input.bias) for node in nodes]
        present = [tensor for tensor in tensors if tensor is not None]
        if not present or len(nodes) == 1:
            return nodes[0].inputs[Input.bias] if present else None
        self._retire(nodes, Input.bias)
        vectors = [
            np.zeros(node.attributes["N"].as_int(), present[0].numpy().dtype)
            if tensor is None
            else tensor.numpy()
            for node, tensor in zip(nodes, tensors, strict=True)
        ]
        joined = np.concatenate(vectors)
        return register_tensor(self.graph, ir.tensor(joined, name=f"{name}.bias"))

    def factors(self, nodes: Sequence[ir.Node], name: str) -> list[ir.Value | None]:
        """The factors of ``nodes``, in the op's order; empty if no rank is above 0."""
        for place in FACTORS:
            self._retire(nodes, place)
        tiled = factor_operands(nodes)
        return [
            self._register(place, name, operand.make, operand.shape, operand.dtype)
            if (operand := tiled.get(place)) is not None
            else None
            for place in FACTORS
        ]

    def _rows(self, nodes: Sequence[ir.Node], position: Input, name: str) -> ir.Value | None:
        tensor = constant_operand(nodes[0], position)
        if tensor is None:
            return None
        _, groups = tensor.shape.numpy()
        return self._stack(nodes, position, name, tile_rows, (groups, TILE), tensor.dtype)

    def _stack(
        self,
        nodes: Sequence[ir.Node],
        position: Input,
        name: str,
        tile: _Convert,
        inner: tuple[int, int],
        dtype: ir.DataType,
    ) -> ir.Value:
        """The operand at ``position`` of every node in tiles of shape ``inner``."""
        sources = tuple(value for node in nodes if (value := node.inputs[position]) is not None)
        self.stale += sources
        if sources not in self._made:
            tensors = [value.const_value for value in sources if value.const_value is not None]
            tiles = sum(-(-tensor.shape.numpy()[0] // TILE) for tensor in tensors)

            def make() -> NDArray[Any]:
                return np.concatenate([tile(tensor.numpy()) for tensor in tensors])

            self._made[sources] = self._register(position, name, make, (tiles, *inner), dtype)
        return self._made[sources]

    def _retire(self, nodes: Sequence[ir.Node], position: Input) -> None:
        operands = (node.inputs[position] for node in nodes if position < len(node.inputs))
        self.stale += [value for value in operands if value is not None]

    def _register(
        self,
        position: Input,
        name: str,
        make: Callable[[], NDArray[Any]],
        shape: tuple[int, ...],
        dtype: ir.DataType,
    ) -> ir.Value:
        """An initializer whose array ``make`` computes on each read."""
        full = f"{name}.{position.name}_tiles"
        lazy = ir.LazyTensor(
            lambda: ir.tensor(make(), name=full), dtype=dtype, shape=ir.Shape(shape), name=full
        )
        return register_tensor(self.graph, lazy)
