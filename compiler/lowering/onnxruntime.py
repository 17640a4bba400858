"""Lowering to ONNX Runtime: fused attention and norms, and a function body for every eoracc op.

The fused attention, ``GroupQueryAttention``, updates the key/value cache in place, which is what
makes decoding cheap. It counts lengths instead of reading the mask, so batches must be padded on
the right, and it takes a chunk on a cache for one row only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from eoracc import __version__
from eoracc.compiler.graph import register_tensor
from eoracc.compiler.linears import FUSED_DOMAIN
from eoracc.compiler.names import WINDOW_KEY
from eoracc.plugins.functions import local_function

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["CONTRIB_DOMAIN", "lower"]

CONTRIB_DOMAIN = "com.microsoft"

_GQA = "GroupQueryAttention"
_SKIP_NORM = "SkipSimplifiedLayerNormalization"
_IR_VERSION = 11
"""The newest that ONNX Runtime 1.31 and onnxruntime-genai 0.18 read; overloads need 10."""


def lower(model: ir.Model) -> ir.Model:
    """Rewrite ``model`` into what ONNX Runtime runs best.

    Args:
      model: as the frontend built it, compressed or not. It is left as it is.

    Returns:
      A new graph that shares its tensors. ``position_ids`` is no longer an input where every
      attention applies the rotary embedding itself.
    """
    lowered = model.clone()
    graph = lowered.graph
    _fuse_attention(graph)
    _fuse_skip_norm(graph)
    common.RemoveUnusedNodesPass()(lowered)
    graph.sort()
    _drop_unused_inputs(graph)
    _add_functions(lowered)
    for node in graph:
        node.metadata_props.clear()
    used = {node.domain for node in graph}
    graph.opset_imports.update({domain: 1 for domain in used if domain})
    lowered.ir_version = _IR_VERSION
    lowered.producer_name, lowered.producer_version = "eoracc", __version__
    return lowered


# --- attention ------------------------------------------------------------------------------------


def _fuse_attention(graph: ir.Graph) -> None:
    nodes = [node for node in graph if _is_fusable(node)]
    if not nodes:
        return
    lengths = _cache_lengths(graph)
    for node in nodes:
        _fuse_one(graph, node, lengths)


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


def _cache_lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """``seqlens_k int32 [B]``, index of each row's last key, and the padded length, a scalar."""
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    tape = ir.tape.Tape()

    def constant(role: str, value: int | list[int]) -> ir.Value:
        return register_tensor(graph, ir.tensor(np.array(value), name=f"cache.{role}"))

    valid = tape.op("ReduceSum", [mask, constant("row", [1])], {"keepdims": 0})
    last = tape.op("Sub", [valid, constant("one", 1)])
    length = tape.op("Squeeze", [tape.op("Shape", [mask], {"start": 1, "end": 2})])
    casts = [tape.op("Cast", [value], {"to": ir.DataType.INT32}) for value in (last, length)]
    graph.insert_before(graph[0], tape.nodes)
    return casts[0], casts[1]


def _fuse_one(graph: ir.Graph, node: ir.Node, lengths: tuple[ir.Value, ir.Value]) -> None:
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
        [*projections, *node.inputs[4:6], *lengths, *tables],
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
    (LongRoPE adds an offset), and it wants head dimensions in multiples of 16.
    """
    past_key = node.inputs[4]
    head_size = past_key.shape[3] if past_key is not None and past_key.shape is not None else None
    rotaries = [value.producer() if value is not None else None for value in node.inputs[:2]]
    if not isinstance(head_size, int) or head_size % 16:
        return []
    if any(rotary is None or rotary.op_type != "RotaryEmbedding" for rotary in rotaries):
        return []
    query, key = rotaries
    if tuple(query.inputs[1:]) != tuple(key.inputs[1:]) or len(query.inputs) != 3:  # type: ignore[union-attr]
        return []
    tables = []
    for gathered in query.inputs[1:]:  # type: ignore[union-attr]
        gather = gathered.producer() if gathered is not None else None
        if gather is None or gather.op_type != "Gather":
            return []
        table, indices = gather.inputs
        if table is None or indices is None or indices.name != "position_ids":
            return []
        tables.append(table)
    return tables


def _packed_projection(*parts: ir.Value | None) -> ir.Value | None:
    """The packed tensor whose split, in order and with nothing between, gives ``parts``."""
    splits = {part.producer() if part is not None else None for part in parts}
    split = splits.pop()
    if splits or split is None or split.op_type != "Split" or tuple(split.outputs) != parts:
        return None
    return split.inputs[0]


# --- norms ----------------------------------------------------------------------------------------


def _fuse_skip_norm(graph: ir.Graph) -> None:
    """Fuse ``RMSNormalization(Add(x, skip))``, whose sum the residual stream goes on with."""
    for norm in [node for node in graph if node.op_type == "RMSNormalization"]:
        total, weight = norm.inputs
        add = total.producer() if total is not None else None
        if add is None or add.op_type != "Add" or not _same_shape(*add.inputs):
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


def _same_shape(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Both of rank 3 with equal dimensions: the fused op does not broadcast, a bias add does."""
    if left is None or right is None or left.shape is None or right.shape is None:
        return False
    return len(left.shape) == 3 and left.shape == right.shape


# --- the rest -------------------------------------------------------------------------------------


def _drop_unused_inputs(graph: ir.Graph) -> None:
    for value in list(graph.inputs):
        if not value.uses() and not value.is_graph_output():
            graph.inputs.remove(value)


def _eoracc_nodes(graph: ir.Graph) -> Iterator[ir.Node]:
    return (node for node in graph if node.domain == FUSED_DOMAIN)


def _add_functions(model: ir.Model) -> None:
    """Give every eoracc node its body of standard ops, so that a stock runtime can run it."""
    for node in _eoracc_nodes(model.graph):
        function = local_function(node)
        node.overload = function.overload
        model.functions.setdefault(function.identifier(), function)
