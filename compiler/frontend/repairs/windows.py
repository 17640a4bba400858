"""Sliding windows: noted on each Attention, and masked where the graph does not yet."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.names import WINDOW_KEY
from eoracc.passes.graph.tensors import register_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["mark_windows"]


def mark_windows(model: ir.Model, config: PretrainedConfig) -> None:
    """Note each layer's window on its Attention, and mask by it where the graph does not yet.

    mobius bakes the window into the additive float mask of some families (Gemma3) and leaves it
    out where its mask is the boolean padding mask (Mistral, Phi-3).
    """
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    windows = _windows(config)
    if len(attentions) != len(windows):
        return
    masked: dict[tuple[ir.Value, int], ir.Value] = {}
    for node, window in zip(attentions, windows, strict=True):
        node.metadata_props[WINDOW_KEY] = str(window)
        mask = node.inputs[3]
        if not window or mask is None or mask.dtype == ir.DataType.FLOAT:
            continue
        if (mask, window) not in masked:
            masked[mask, window] = _window_mask(model.graph, mask, window, before=node)
        node.replace_input_with(3, masked[mask, window])


def _windows(config: PretrainedConfig) -> list[int]:
    """Keys that a query of each layer sees; 0 where there is no window."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if not window:
        return [0] * layers
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [int(window)] * layers
    return [int(window) if kind == "sliding_attention" else 0 for kind in layer_types]


def _window_mask(graph: ir.Graph, mask: ir.Value, window: int, *, before: ir.Node) -> ir.Value:
    """``mask [B, 1, S, T]`` and ``query - key < window``, where query ``S - 1`` is at ``T - 1``."""
    tape = ir.tape.Tape()
    prefix = f"window_{window}"

    def constant(role: str, value: int | list[int]) -> ir.Value:
        return register_tensor(graph, ir.tensor(np.array(value), name=f"{prefix}.{role}"))

    def length(name: str) -> ir.Value:
        source = next(value for value in graph.inputs if value.name == name)
        return tape.op("Squeeze", [tape.op("Shape", [source], {"start": 1, "end": 2})])

    queries, keys, one = length("input_ids"), length("attention_mask"), constant("one", 1)
    query = tape.op("Range", [tape.op("Sub", [keys, queries]), keys, one])
    column = tape.op("Unsqueeze", [query, constant("axes", [1])])
    key = tape.op("Range", [constant("zero", 0), keys, one])
    near = tape.op("Less", [tape.op("Sub", [column, key]), constant("keys", window)])
    combined = tape.op("And", [mask, near])
    combined.type, combined.shape = mask.type, mask.shape
    graph.insert_before(before, tape.nodes)
    return combined
