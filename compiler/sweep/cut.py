"""Cut a graph at its linears and its attentions into segments that run one after another.

A node's *level* is the number of linears on the longest path to it. Linears of a level that share
an input form a group: for a Llama block (q, k, v), (o), (gate, up), (down). All other nodes of a
level run between the linears of the level below and its own. They form *segments*: glue (norms,
rotary embedding, activation functions) and attention by turns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from eoracc.passes.graph.linears import Linear, LinearGroup
from eoracc.plugins.functions.overload import use_local_functions
from eoracc.plugins.op import DOMAIN

__all__ = ["Segment", "cut_graph", "group_by_level", "node_levels", "segment_model"]

_INLINE_ELEMENTS = 16
"""Initializers above this size are fed to a glue session: small ones are shapes and axes, which
ONNX Runtime folds; large ones are weights, which differ from block to block."""

_Place = tuple[int, int]
"""Level of a segment and its index there: glue has even indices, attention odd ones."""


@dataclass(eq=False)
class Segment:
    """Nodes that run together: either glue (any nodes but linears and attentions) or attentions.

    Attributes:
      nodes: in graph order; empty where a level has no glue.
      inputs: values that the nodes read and do not compute.
      outputs: values that a later segment or a linear reads.
      drop: names of the values that nothing reads after this segment.
    """

    nodes: list[ir.Node]
    inputs: list[ir.Value]
    outputs: list[ir.Value]
    drop: list[str]

    @property
    def is_attention(self) -> bool:
        """Whether the nodes are attentions."""
        return bool(self.nodes) and _is_attention(self.nodes[0])


def node_levels(graph: ir.Graph, linears: Sequence[Linear]) -> dict[ir.Node, int]:
    """Number of linears on the longest path to each node (a linear does not count itself)."""
    linear_nodes = {linear.node for linear in linears}
    levels: dict[ir.Node, int] = {}
    for node in graph:
        level = 0
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is not None:
                level = max(level, levels[producer] + (producer in linear_nodes))
        levels[node] = level
    return levels


def group_by_level(
    linears: Sequence[Linear], levels: Mapping[ir.Node, int]
) -> list[list[LinearGroup]]:
    """Groups of linears that share an input, by level, in execution order."""
    count = 1 + max(levels[linear.node] for linear in linears)
    sharing: list[dict[ir.Value, list[Linear]]] = [{} for _ in range(count)]
    for linear in linears:
        sharing[levels[linear.node]].setdefault(linear.input, []).append(linear)
    return [[LinearGroup(tuple(members)) for members in level.values()] for level in sharing]


def cut_graph(
    graph: ir.Graph,
    linears: Sequence[Linear],
    levels: Mapping[ir.Node, int],
    kept: Sequence[ir.Value],
) -> list[list[Segment]]:
    """The segments of each level, in execution order.

    Args:
      graph: to be cut.
      linears: all of the graph's.
      levels: from :func:`node_levels`.
      kept: outputs of the graph that are wanted, the logits among them; they are never dropped.

    Returns:
      For each level the segments before its linears, and last those after the head. Each list
      begins with a glue segment, which may have no node.
    """
    linear_nodes = {linear.node for linear in linears}
    # The Transpose of a tied head's embedding: the executor's caller supplies its result.
    weight_nodes = {linear.node.inputs[1].producer() for linear in linears}  # type: ignore[union-attr]
    places = _places(graph, levels, linear_nodes | weight_nodes)
    level_count = 2 + max(levels[node] for node in linear_nodes)
    order = sorted({*places.values(), *((level, 0) for level in range(level_count))})
    positions = {place: position for position, place in enumerate(order)}

    nodes_at: dict[_Place, list[ir.Node]] = defaultdict(list)
    last_reads: dict[ir.Value, int] = dict.fromkeys(kept, len(order))
    for node in graph:
        if node in places:
            nodes_at[places[node]].append(node)
            read, position = node.inputs, positions[places[node]]
        elif node in linear_nodes:
            # A linear runs after all segments of its level: its input is dropped in the next one.
            read, position = node.inputs[:1], positions[levels[node] + 1, 0]
        else:
            continue
        for value in read:
            if value is not None:
                last_reads[value] = max(last_reads.get(value, 0), position)

    segments: list[list[Segment]] = [[] for _ in range(level_count)]
    for place, position in positions.items():
        segments[place[0]].append(_segment(nodes_at[place], position, last_reads))
    return segments


def segment_model(glue: Segment, parent: ir.Model) -> ir.Model:
    """A segment as a model of its own.

    Values and nodes are named by position, so that equal glue of two blocks gives equal models.

    Args:
      glue: a segment of ``parent``.
      parent: gives the opset and IR versions.
    """
    copies: dict[str, ir.Value] = {}

    def copy(value: ir.Value) -> ir.Value:
        # Looked up by name: compression may have replaced a value since the graph was cut.
        name = str(value.name)
        if name not in copies:
            copies[name] = ir.Value(
                name=f"v{len(copies)}",
                type=value.type,
                shape=value.shape,
                const_value=value.const_value if _is_inlined(value) else None,
            )
        return copies[name]

    inputs = [copy(value) for value in glue.inputs]
    nodes = [
        ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else copy(value) for value in node.inputs],
            node.attributes.values(),
            outputs=[copy(value) for value in node.outputs],
            name=f"n{position}",
        )
        for position, node in enumerate(glue.nodes)
    ]
    functions: dict[ir.OperatorIdentifier, ir.Function] = {}
    use_local_functions((node for node in nodes if node.domain == DOMAIN), functions)
    constants = dict.fromkeys(
        copy(value)
        for node in glue.nodes
        for value in node.inputs
        if value is not None and _is_inlined(value)
    )
    graph = ir.Graph(
        inputs,
        [copy(value) for value in glue.outputs],
        nodes=nodes,
        initializers=list(constants),
        opset_imports=dict(parent.graph.opset_imports),
        name="glue",
    )
    return ir.Model(graph, ir_version=parent.ir_version, functions=list(functions.values()))


def _places(
    graph: ir.Graph, levels: Mapping[ir.Node, int], excluded: Collection[ir.Node | None]
) -> dict[ir.Node, _Place]:
    """The segment of each node that is not ``excluded``: the first that its inputs allow."""
    places: dict[ir.Node, _Place] = {}
    for node in graph:
        if node in excluded:
            continue
        level, index = levels[node], 0
        for value in node.inputs:
            producer = None if value is None else value.producer()
            if producer is None or producer not in places or places[producer][0] != level:
                continue
            # Glue shares the segment of glue that it reads, and follows the attention.
            producer_index = places[producer][1]
            index = max(index, producer_index + producer_index % 2)
        places[node] = (level, index + _is_attention(node))
    return places


def _segment(nodes: list[ir.Node], position: int, last_reads: Mapping[ir.Value, int]) -> Segment:
    """The segment of ``nodes``, the ``position``-th of the graph.

    Args:
      nodes: in graph order.
      position: of the segment among all.
      last_reads: by value, the position of the last segment that needs it.
    """
    computed = {output for node in nodes for output in node.outputs}
    inputs = dict.fromkeys(
        value
        for node in nodes
        for value in node.inputs
        if value is not None and value not in computed and not _is_inlined(value)
    )
    outputs = [
        output for node in nodes for output in node.outputs if last_reads.get(output, -1) > position
    ]
    drop = [str(value.name) for value, last in last_reads.items() if last == position]
    return Segment(nodes, list(inputs), outputs, drop)


def _is_attention(node: ir.Node) -> bool:
    """Whether :func:`~eoracc.compiler.sweep.products.attention` can compute ``node``."""
    return (
        node.op_type == "Attention"
        and node.domain == ""
        and "q_num_heads" in node.attributes
        and ("softcap" not in node.attributes or not node.attributes["softcap"].as_float())
        and not any(output.uses() for output in node.outputs[1:])
    )


def _is_inlined(value: ir.Value) -> bool:
    tensor = value.const_value
    return tensor is not None and tensor.size <= _INLINE_ELEMENTS
