"""Rewrite every Attention for TensorRT, with explicit cache and mask.

TensorRT's attention has one output and no notion of a past, and it takes a mask or causality but
not both. So keys and values are put into the cache by nodes of their own, and what a query may see
is one mask: its padding, its future and, where the layer has one, what lies beyond its window.

Positions decide. ``position_ids`` counts the valid tokens of a row from 0, and a key's position is
counted off the mask; a query sees the valid keys at its own position and before. Padding may
therefore lie anywhere in a row, as it does after a batch of unequal prompts was prefilled. A token
that is padding sees a valid one too, so that no softmax is of nothing: every row has a valid token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx_ir as ir

from eoracc.errors import PassError
from eoracc.passes.graph.names import WINDOW_KEY
from eoracc.passes.graph.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Mapping


__all__ = [
    "WRITE_INDICES",
    "CacheLayout",
    "check_attention",
    "explicit_attention",
    "head_size",
]

CacheLayout = Literal["concat", "in_place"]
"""``concat``: past and this call's tokens become a longer present. ``in_place``: this call's tokens
are written into the buffer of the past."""

_SEQUENCE, _TOTAL = "sequence", "total"
WRITE_INDICES = "write_indices"
"""Input of a decoder with its cache in place: where each row's new tokens are written."""

_Update = Callable[[ir.tape.Tape, ir.Value, ir.Value, str], tuple[ir.Value, ir.Value]]
"""Maps past and new tokens to the present (an output) and the part that the attention reads."""


def explicit_attention(
    graph: ir.Graph,
    *,
    mask_dtype: ir.DataType,
    cache: CacheLayout = "concat",
    capacity: int | None = None,
) -> None:
    """Rewrite every Attention of ``graph``, and name the dimensions of its inputs.

    Args:
      graph: of a decoder as the frontend built it, changed in place.
      mask_dtype: of what is added to scores: TensorRT builds smaller kernels for that than for a
        boolean mask.
      cache: how the present comes of the past. With ``in_place`` the graph has one more input,
        ``write_indices [B]`` int64: the place in the cache of each row's first new token.
      capacity: tokens that a cache in place has room for, a static dimension.

    Raises:
      PassError: an attention is not a causal one over the cache, or caps its scores.
    """
    check_attention(graph)
    nodes = [node for node in graph if node.op_type == "Attention"]
    inputs = {str(value.name): value for value in graph.inputs}
    _name_dimensions(graph, inputs, capacity if cache == "in_place" else None)
    masks = _Masks(graph, inputs["attention_mask"], inputs["position_ids"], mask_dtype)
    update: _Update = _concatenate
    if cache == "in_place":
        update = _in_place(graph, inputs["attention_mask"], nodes[0])
    for node in nodes:
        _rewrite(graph, node, masks, update)


def check_attention(graph: ir.Graph) -> None:
    """Check that TensorRT can be given the attention of ``graph``, a decoder of the frontend.

    Raises:
      PassError: an attention is not a causal one over the cache, or caps its scores.
    """
    for node in graph:
        if node.op_type == "Attention":
            _refuse(node)


def head_size(attention: ir.Node) -> int:
    """Elements of a key in the cache of an attention that :func:`check_attention` has passed."""
    past = attention.inputs[4]
    assert past is not None and past.shape is not None  # noqa: PT018, S101 - an input of the graph
    size = past.shape[3]
    assert isinstance(size, int)  # noqa: S101 - only calls decide the other dimensions
    return size


def _refuse(node: ir.Node) -> None:
    where = f"node {node.name}"
    pasts = node.inputs[4:6]
    if (
        WINDOW_KEY not in node.metadata_props
        or node.attributes.get_int("is_causal", 0) != 1
        or len(pasts) != 2
        or any(past is None or not past.is_graph_input() for past in pasts)
    ):
        raise PassError(
            where,
            "TensorRT is given causal attention over a key/value cache only, which this is not: "
            "take the target out of 'targets'",
        )
    if node.attributes.get_float("softcap", 0.0) > 0:
        raise PassError(
            where,
            "caps its scores (attn_logit_softcapping), which TensorRT's attention cannot: "
            "take the target out of 'targets'",
        )


def _name_dimensions(graph: ir.Graph, inputs: Mapping[str, ir.Value], capacity: int | None) -> None:
    """Name each dynamic dimension, the same in every input and output."""
    inputs["input_ids"].shape = ir.Shape(["batch", _SEQUENCE])
    inputs["position_ids"].shape = ir.Shape(["batch", _SEQUENCE])
    inputs["attention_mask"].shape = ir.Shape(["batch", _TOTAL])
    for value in (*graph.inputs, *graph.outputs):
        is_past = str(value.name).startswith("past_key_values.")
        if (is_past or str(value.name).startswith("present.")) and value.shape is not None:
            length = capacity or ("past" if is_past else _TOTAL)
            value.shape = ir.Shape(["batch", value.shape[1], length, value.shape[3]])


class _Masks:
    """The masks of a graph by window, ``[B, 1, S, T]`` each, created once.

    What is hidden gets the lowest number of the type added to its score, and with it the weight 0.
    """

    def __init__(
        self,
        graph: ir.Graph,
        attention_mask: ir.Value,
        position_ids: ir.Value,
        dtype: ir.DataType,
    ) -> None:
        self._graph, self._dtype, self._first = graph, dtype, graph[0]
        self._by_window: dict[int, ir.Value] = {}
        tape = ir.tape.Tape()
        valid = tape.op("Cast", [attention_mask], {"to": int(ir.DataType.BOOL)})
        valid = tape.op("Unsqueeze", [valid, self._integers("rows", [1, 2])])
        # Counts of valid keys begin at 1, positions at 0.
        keys = tape.op("CumSum", [attention_mask, self._integers("axis", 1)])
        self._keys = tape.op("Unsqueeze", [keys, self._integers("rows", [1, 2])])
        queries = tape.op("Add", [position_ids, self._integers("one", 1)])
        self._queries = tape.op("Unsqueeze", [queries, self._integers("columns", [1, 3])])
        past = tape.op("GreaterOrEqual", [self._queries, self._keys])
        self._seen = tape.op("And", [valid, past], name="mask.causal")
        graph.insert_before(self._first, tape.nodes)

    def of(self, window: int) -> ir.Value:
        """The mask of queries that see ``window`` keys, including their own; 0 means all keys."""
        if window not in self._by_window:
            self._by_window[window] = self._make(window)
        return self._by_window[window]

    def _make(self, window: int) -> ir.Value:
        tape = ir.tape.Tape()
        seen = self._seen
        if window:
            distance = tape.op("Sub", [self._queries, self._keys])
            near = tape.op("Less", [distance, self._integers(f"window_{window}", window)])
            seen = tape.op("And", [seen, near])
        numpy = self._dtype.numpy()
        lowest = {ir.DataType.FLOAT16: -65504.0, ir.DataType.BFLOAT16: -(2.0**127)}[self._dtype]
        mask = tape.op(
            "Where",
            [
                seen,
                constant(self._graph, "mask.seen", np.array(0, numpy)),
                constant(self._graph, "mask.hidden", np.array(lowest, numpy)),
            ],
            name=f"mask.window_{window}" if window else "mask",
        )
        mask.type = ir.TensorType(self._dtype)
        mask.shape = ir.Shape(["batch", 1, _SEQUENCE, _TOTAL])
        self._graph.insert_before(self._first, tape.nodes)
        return mask

    def _integers(self, role: str, value: int | list[int]) -> ir.Value:
        return constant(self._graph, f"mask.{role}", np.array(value, np.int64))


def _concatenate(
    tape: ir.tape.Tape, past: ir.Value, new: ir.Value, name: str
) -> tuple[ir.Value, ir.Value]:
    present = tape.op("Concat", [past, new], {"axis": 2}, name=name)
    return present, present


def _in_place(graph: ir.Graph, attention_mask: ir.Value, before: ir.Node) -> _Update:
    """The update of a cache in place; it adds its input to ``graph``."""
    indices = ir.Value(
        name=WRITE_INDICES, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch"])
    )
    graph.inputs.append(indices)
    tape = ir.tape.Tape()
    total = tape.op("Shape", [attention_mask], {"start": 1, "end": 2}, name="cache.total")
    graph.insert_before(before, tape.nodes)
    zero, axis = (
        constant(graph, f"cache.{role}", np.array([value], np.int64))
        for role, value in (("zero", 0), ("axis", 2))
    )

    def update(
        tape: ir.tape.Tape, past: ir.Value, new: ir.Value, name: str
    ) -> tuple[ir.Value, ir.Value]:
        present = tape.op("TensorScatter", [past, new, indices], {"axis": 2}, name=name)
        return present, tape.op("Slice", [present, zero, total, axis], name=f"{name}/used")

    return update


def _rewrite(graph: ir.Graph, node: ir.Node, masks: _Masks, update: _Update) -> None:
    mask = masks.of(int(node.metadata_props[WINDOW_KEY]))
    tape = ir.tape.Tape()
    query_heads, kv_heads = (
        node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")
    )
    pasts = node.inputs[4:6]
    prefix = str(node.name)
    size = head_size(node)
    heads = [
        _split_heads(graph, tape, value, count, size)
        for value, count in zip(node.inputs[:3], (query_heads, kv_heads, kv_heads), strict=True)
    ]
    presents, read = [], []
    for past, new, kind in zip(pasts, heads[1:], ("key", "value"), strict=True):
        assert past is not None  # noqa: S101 - _refuse has seen to it
        present, used = update(tape, past, new, f"{prefix}.{kind}_cache")
        presents.append(present)
        read.append(used)
    attributes: dict[str, float] = {}
    if (scale := node.attributes.get_float("scale", 0.0)) > 0:
        attributes["scale"] = scale
    mixed = tape.op("Attention", [heads[0], *read, mask], attributes, name=prefix)
    mixed = tape.op("Transpose", [mixed], {"perm": [0, 2, 1, 3]})
    merged = tape.op("Reshape", [mixed, constant(graph, "heads.merge", np.array([0, 0, -1]))])
    for made in tape.nodes:
        for output in made.outputs:
            output.type = node.outputs[0].type
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], tape.nodes, node.outputs, [merged, *presents]
    )


def _split_heads(
    graph: ir.Graph, tape: ir.tape.Tape, value: ir.Value | None, heads: int, size: int
) -> ir.Value:
    """``[B, S, heads * size]`` as ``[B, heads, S, size]``, rotated if it was rotated before."""
    assert value is not None  # noqa: S101 - attention always has its first three inputs
    shape = constant(graph, f"heads.{heads}", np.array([0, 0, heads, -1]))
    rotary = value.producer()
    is_rotated = rotary is not None and rotary.op_type == "RotaryEmbedding"
    source = rotary.inputs[0] if is_rotated else value  # type: ignore[union-attr]
    split = tape.op("Reshape", [source, shape])
    split = tape.op("Transpose", [split], {"perm": [0, 2, 1, 3]})
    if rotary is None or not is_rotated:
        return split
    rotated = rotary.attributes.get_int("rotary_embedding_dim", 0)
    if rotary.attributes.get_int("interleaved", 0):
        split = _part_pairs(graph, tape, split, rotated or size, size)
    return tape.op(
        "RotaryEmbedding",
        [split, *rotary.inputs[1:]],
        {"interleaved": 0, "rotary_embedding_dim": rotated},
        name=rotary.name,
    )


def _part_pairs(
    graph: ir.Graph, tape: ir.tape.Tape, split: ir.Value, rotated: int, size: int
) -> ir.Value:
    """Put the first elements of all pairs of neighbours before the second ones.

    TensorRT for RTX does not build an interleaved rotation. Queries and keys are reordered alike,
    which changes no score; the cache holds keys in this order.

    Args:
      graph: for constants.
      tape: for the nodes.
      split: ``[B, heads, S, size]``.
      rotated: elements of a head that are rotated, the first ones.
      size: of a head.
    """
    parts = [split]
    if rotated < size:
        sizes = constant(graph, "heads.rotated", np.array([rotated, size - rotated]))
        parts = list(tape.op_multi_out("Split", [split, sizes], {"axis": 3}, num_outputs=2))
    pairs = constant(graph, "heads.pairs", np.array([0, 0, 0, rotated // 2, 2]))
    halves = tape.op("Reshape", [parts[0], pairs])
    halves = tape.op("Transpose", [halves], {"perm": [0, 1, 2, 4, 3]})
    whole = constant(graph, "heads.halves", np.array([0, 0, 0, rotated]))
    parts[0] = tape.op("Reshape", [halves, whole])
    return parts[0] if len(parts) == 1 else tape.op("Concat", parts, {"axis": 3})
