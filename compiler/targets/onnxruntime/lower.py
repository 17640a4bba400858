"""Lowering to ONNX Runtime: fused attention, tiled linears fused with their neighbours.

A decoder block becomes five nodes where its family allows it: q/k/v with the norm before them, the
attention, the output projection with the residual, gate and up with their norm and activation, and
down with the residual. Every eoracc op gets a function body, so that a stock runtime can run it.

The fused attention, ``GroupQueryAttention``, updates the key/value cache in place, which is what
makes decoding cheap. It counts lengths instead of reading the mask, so batches must be padded on
the right, and it takes a chunk on a cache for one row only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from eoracc import __version__
from eoracc.compiler.targets.onnxruntime.fuse_linears import (
    fuse_bias,
    fuse_gate,
    fuse_norm,
    fuse_residual,
    same_shape,
)
from eoracc.compiler.targets.onnxruntime.last_logits import keep_last_logits
from eoracc.compiler.targets.onnxruntime.narrow_constants import narrow_constants
from eoracc.compiler.targets.onnxruntime.pad_heads import pad_heads
from eoracc.compiler.targets.onnxruntime.rotary_tables import compute_rotary_tables
from eoracc.compiler.targets.onnxruntime.slots import add_slots
from eoracc.compiler.targets.onnxruntime.tiles import tile_operands
from eoracc.passes.graph.names import ROPE_LENGTHS, WINDOW_KEY
from eoracc.passes.graph.tensors import register_tensor
from eoracc.plugins.functions.overload import use_local_functions
from eoracc.plugins.op import DOMAIN
from eoracc.runtime.artifact.graph_names import LINEARS_KEY, TEXT_LENGTHS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["CONTRIB_DOMAIN", "artifact_graph", "lower"]

CONTRIB_DOMAIN = "com.microsoft"

_GQA = "GroupQueryAttention"
_ROTARY_HEAD_MULTIPLE, _TABLE_MULTIPLE = 16, 8
_SKIP_NORM = "SkipSimplifiedLayerNormalization"
_IR_VERSION = 11
"""The newest that ONNX Runtime 1.31 and onnxruntime-genai 0.18 read; overloads need 10."""


def artifact_graph(
    model: ir.Model, *, accuracy_level: int = 0, adapter_type: str = "none"
) -> ir.Model:
    """The graph of an artifact: :func:`lower`, with constants in the types that are stored."""
    lowered = lower(model, accuracy_level=accuracy_level, adapter_type=adapter_type)
    narrow_constants(lowered.graph)
    return lowered


def lower(model: ir.Model, *, accuracy_level: int = 0, adapter_type: str = "none") -> ir.Model:
    """Rewrite ``model`` with the operators that ONNX Runtime runs fastest.

    Args:
      model: as the frontend built it, compressed or not. It is left as it is.
      accuracy_level: of every compressed linear: 0 for float activations, 4 allows int8 ones.
      adapter_type: what adapters of compressed linears in decoder blocks are made of, ``int8`` or
        ``float16``, see :mod:`eoracc.compiler.targets.onnxruntime.slots`; ``none`` takes no
        adapters.

    Returns:
      A new graph that shares the tensors of what is not compressed. ``position_ids`` is no longer
      an input where every attention applies the rotary embedding itself. Logits are those of each
      row's last token, or of as many as the optional input ``logits_to_keep`` says.
    """
    lowered = model.clone()
    graph = lowered.graph
    lengths = _Lengths.of(graph)
    fuse_bias(graph)
    fuse_gate(graph)
    tile_operands(graph, accuracy_level=accuracy_level)
    fuse_gate(graph)
    if lengths is not None:
        _fuse_attention(graph, lengths)
        keep_last_logits(graph, lengths.last)
    _take_text_lengths(graph)
    fuse_norm(graph)
    fuse_residual(graph)
    _fuse_skip_norm(graph)
    common.RemoveUnusedNodesPass()(lowered)
    compute_rotary_tables(graph)
    graph.sort()
    _drop_unused_inputs(graph)
    if adapter_type != "none":
        add_slots(lowered, adapter_type)
    use_local_functions(_eoracc_nodes(graph), lowered.functions)
    for node in graph:
        for key in set(node.metadata_props) - {LINEARS_KEY}:
            del node.metadata_props[key]
    used = {node.domain for node in graph}
    graph.opset_imports.update({domain: 1 for domain in used if domain})
    lowered.ir_version = _IR_VERSION
    lowered.producer_name, lowered.producer_version = "eoracc", __version__
    return lowered


@dataclass(frozen=True, eq=False)
class _Lengths:
    """The counts that are computed from the attention mask.

    Attributes:
      last: index of each row's last valid token, ``int64 [B]``.
      total: length of the padded rows, ``int64 []``.
    """

    last: ir.Value
    total: ir.Value

    @classmethod
    def of(cls, graph: ir.Graph) -> _Lengths | None:
        """Put nodes that count before all others; None where there is no mask."""
        mask = next((value for value in graph.inputs if value.name == "attention_mask"), None)
        if mask is None:
            return None
        tape = ir.tape.Tape()

        def constant(role: str, value: int | list[int]) -> ir.Value:
            return register_tensor(graph, ir.tensor(np.array(value), name=f"cache.{role}"))

        valid = tape.op("ReduceSum", [mask, constant("row", [1])], {"keepdims": 0})
        last = tape.op("Sub", [valid, constant("one", 1)])
        total = tape.op("Squeeze", [tape.op("Shape", [mask], {"start": 1, "end": 2})])
        graph.insert_before(graph[0], tape.nodes)
        return cls(last, total)


# --- attention ------------------------------------------------------------------------------------


def _fuse_attention(graph: ir.Graph, lengths: _Lengths) -> None:
    nodes = [node for node in graph if _is_fusable(node)]
    if not nodes:
        return
    pad_heads(graph, nodes)
    tape = ir.tape.Tape()
    counts = [
        tape.op("Cast", [value], {"to": ir.DataType.INT32})
        for value in (lengths.last, lengths.total)
    ]
    graph.insert_before(nodes[0], tape.nodes)
    for node in nodes:
        _fuse_one(graph, node, counts)


def _is_fusable(node: ir.Node) -> bool:
    """Whether a causal decoder attention over the cache, with a mask that the fused op can count.

    Only the frontend knows that a mask holds padding, causality and a window and nothing else: it
    says so by noting the window.
    """
    if node.op_type != "Attention" or node.domain != "" or len(node.inputs) != 6:
        return False
    pasts = node.inputs[4:6]
    return (
        WINDOW_KEY in node.metadata_props
        and node.attributes.get_int("is_causal", 0) == 1
        and node.attributes.get_int("q_num_heads", 0) > 0
        and all(past is not None and past.is_graph_input() for past in pasts)
    )


def _fuse_one(graph: ir.Graph, node: ir.Node, counts: Sequence[ir.Value]) -> None:
    """``counts``: index of each row's last key, ``int32 [B]``, and the padded length, a scalar."""
    query, key, value = node.inputs[:3]
    attributes: dict[str, int | float] = {
        "num_heads": node.attributes.get_int("q_num_heads"),
        "kv_num_heads": node.attributes.get_int("kv_num_heads"),
    }
    if (scale := node.attributes.get_float("scale", 0.0)) > 0:
        attributes["scale"] = scale
    if (softcap := node.attributes.get_float("softcap", 0.0)) > 0:
        attributes["softcap"] = softcap
    if (window := int(node.metadata_props[WINDOW_KEY])) > 0:
        attributes["local_window_size"] = window
    tables = _rotary_tables(node)
    if tables:
        query, key = query.producer().inputs[0], key.producer().inputs[0]  # type: ignore[union-attr]
        rotary = node.inputs[0].producer()  # type: ignore[union-attr]
        attributes["do_rotary"] = 1
        attributes["rotary_interleaved"] = rotary.attributes.get_int("interleaved", 0)  # type: ignore[union-attr]
    packed = _packed_projection(query, key, value)
    projections = (query, key, value) if packed is None else (packed, None, None)
    fused = ir.node(
        _GQA,
        [*projections, *node.inputs[4:6], *counts, *tables],
        attributes,
        domain=CONTRIB_DOMAIN,
        num_outputs=3,
        name=node.name,
    )
    ir.convenience.replace_nodes_and_values(
        graph, node, [node], [fused], node.outputs, fused.outputs[: len(node.outputs)]
    )


def _rotary_tables(node: ir.Node) -> list[ir.Value]:
    """The cosine and sine tables that the fused op can apply itself; empty where it cannot.

    It indexes them by position, so they must be gathered by ``position_ids`` and nothing else
    (LongRoPE adds an offset). It wants heads in multiples of 16 and tables in multiples of 8, which
    rotate twice as many elements.
    """
    past_key = node.inputs[4]
    head_size = past_key.shape[3] if past_key is not None and past_key.shape is not None else None
    rotaries = [value.producer() if value is not None else None for value in node.inputs[:2]]
    if not isinstance(head_size, int) or head_size % _ROTARY_HEAD_MULTIPLE:
        return []
    if any(rotary is None or rotary.op_type != "RotaryEmbedding" for rotary in rotaries):
        return []
    query, key = rotaries
    if tuple(query.inputs[1:]) != tuple(key.inputs[1:]) or len(query.inputs) != 3:  # type: ignore[union-attr]
        return []
    tables = [_table(gathered) for gathered in query.inputs[1:]]  # type: ignore[union-attr]
    return [] if None in tables else [table for table in tables if table is not None]


def _table(gathered: ir.Value | None) -> ir.Value | None:
    """The table whose rows at ``position_ids`` are ``gathered``; None if it is not to be fused."""
    gather = gathered.producer() if gathered is not None else None
    if gather is None or gather.op_type != "Gather":
        return None
    table, indices = gather.inputs
    if table is None or indices is None or indices.name != "position_ids":
        return None
    width = None if table.shape is None else table.shape[1]
    return table if isinstance(width, int) and width % _TABLE_MULTIPLE == 0 else None


def _packed_projection(*parts: ir.Value | None) -> ir.Value | None:
    """The packed tensor whose split, in order and with nothing between, gives ``parts``."""
    splits = {part.producer() if part is not None else None for part in parts}
    split = splits.pop()
    if splits or split is None or split.op_type != "Split" or tuple(split.outputs) != parts:
        return None
    return split.inputs[0]


# --- LongRoPE -------------------------------------------------------------------------------------


def _take_text_lengths(graph: ir.Graph) -> None:
    """Let a call say how long its rows will become, where that decides how they are rotated.

    The first chunk of a long prompt must be rotated as the whole prompt. Who feeds a prompt at
    once, as onnxruntime-genai does, needs not know the input.
    """
    values = (value for node in graph for value in node.outputs)
    lengths = next((value for value in values if value.name == ROPE_LENGTHS), None)
    if lengths is None:
        return
    default = np.zeros((1, 1), np.int64)
    given = register_tensor(graph, ir.tensor(default, name=TEXT_LENGTHS))
    given.shape = ir.Shape(["text_batch", 1])
    graph.inputs.append(given)
    uses = list(lengths.uses())
    tape = ir.tape.Tape()
    longest = tape.op("Max", [lengths, given])
    longest.type, longest.shape = lengths.type, lengths.shape
    for use in uses:
        use.node.replace_input_with(use.idx, longest)
    graph.insert_after(lengths.producer(), tape.nodes)  # type: ignore[arg-type]


# --- norms ----------------------------------------------------------------------------------------


def _fuse_skip_norm(graph: ir.Graph) -> None:
    """Fuse ``RMSNormalization(Add(x, skip))``; the sum remains an output, the residual stream."""
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        total, weight = norm.inputs
        add = total.producer() if total is not None else None
        if add is None or add.op_type != "Add" or not same_shape(*add.inputs):
            continue
        if total.is_graph_output() or norm.attributes.get_int("axis", -1) != -1:  # type: ignore[union-attr]
            continue
        fused = ir.node(
            _SKIP_NORM,
            [*add.inputs, weight],
            {"epsilon": norm.attributes.get_float("epsilon", 1e-5)},
            domain=CONTRIB_DOMAIN,
            num_outputs=4,
            name=norm.name,
        )
        # Outputs 1 and 2 are training's; an output without a name is left out.
        fused.outputs[1].name = fused.outputs[2].name = ""
        ir.convenience.replace_nodes_and_values(
            graph,
            norm,
            [norm, add],
            [fused],
            [norm.outputs[0], add.outputs[0]],
            [fused.outputs[0], fused.outputs[3]],
        )


# --- the rest -------------------------------------------------------------------------------------


def _drop_unused_inputs(graph: ir.Graph) -> None:
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)


def _eoracc_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.domain == DOMAIN)
