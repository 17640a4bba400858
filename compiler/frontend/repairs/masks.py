"""Masks of attention: one form for all families, with each layer's sliding window.

mobius makes a boolean mask of the padding for some families and leaves windows to the reader. For
others it bakes padding, causality and windows into a float mask, where OLMo 3 lacks its windows and
Gemma 2 has them on the wrong layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.names import WINDOW_KEY
from eoracc.passes.graph.tensors import constant

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["layer_windows", "restore_masks"]


def layer_windows(config: PretrainedConfig) -> list[int]:
    """Keys that a query of each layer sees; 0 where there is no window."""
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if not window:
        return [0] * layers
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [int(window)] * layers
    return [int(window) if kind == "sliding_attention" else 0 for kind in layer_types]


def restore_masks(model: ir.Model, config: PretrainedConfig) -> None:
    """Give each Attention a causal boolean mask with its layer's window, and note the window on it.

    A mask with values of its own for each head (ALiBi) is left alone, and its layer gets no note.
    """
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    windows = layer_windows(config)
    if len(attentions) != len(windows):
        return
    masks = _Masks(model.graph)
    for node, window in zip(attentions, windows, strict=True):
        mask = node.inputs[3]
        if mask is not None and mask.dtype == ir.DataType.FLOAT:
            if mask.shape is None or len(mask.shape) != 4 or mask.shape[1] != 1:
                continue
            node.replace_input_with(3, masks.whole(window, before=node))
            node.attributes.add(ir.AttrInt64("is_causal", 1))
        elif mask is not None and window:
            node.replace_input_with(3, masks.windowed(mask, window, before=node))
        node.metadata_props[WINDOW_KEY] = str(window)


class _Masks:
    """The masks of a graph, each made once, before the first node that reads it."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value | None, int], ir.Value] = {}

    def whole(self, window: int, *, before: ir.Node) -> ir.Value:
        """Padding, causality and the window, ``bool [B, 1, S, T]``."""
        if (None, window) not in self._made:
            tape = ir.tape.Tape()
            (valid,) = (v for v in self._graph.inputs if v.name == "attention_mask")
            valid = tape.op("Cast", [valid], {"to": int(ir.DataType.BOOL)})
            valid = tape.op("Unsqueeze", [valid, self._constant("heads", [1, 2])])
            query, key = self._places(tape)
            mask = tape.op("And", [valid, tape.op("GreaterOrEqual", [query, key])])
            if window:
                mask = tape.op("And", [mask, self._near(tape, query, key, window)])
            mask.type = ir.TensorType(ir.DataType.BOOL)
            mask.shape = ir.Shape(["batch", 1, "sequence_len", "past_seq_len + seq_len"])
            self._graph.insert_before(before, tape.nodes)
            self._made[None, window] = mask
        return self._made[None, window]

    def windowed(self, mask: ir.Value, window: int, *, before: ir.Node) -> ir.Value:
        """``mask [B, 1, S, T]`` and the window."""
        if (mask, window) not in self._made:
            tape = ir.tape.Tape()
            near = self._near(tape, *self._places(tape), window)
            combined = tape.op("And", [mask, near])
            combined.type, combined.shape = mask.type, mask.shape
            self._graph.insert_before(before, tape.nodes)
            self._made[mask, window] = combined
        return self._made[mask, window]

    def _places(self, tape: ir.tape.Tape) -> tuple[ir.Value, ir.Value]:
        """Of the queries ``[S, 1]``, the last of which is the last key, and of the keys ``[T]``."""
        queries, keys = self._length(tape, "input_ids"), self._length(tape, "attention_mask")
        one, zero = self._constant("one", 1), self._constant("zero", 0)
        query = tape.op("Range", [tape.op("Sub", [keys, queries]), keys, one])
        column = tape.op("Unsqueeze", [query, self._constant("axes", [1])])
        return column, tape.op("Range", [zero, keys, one])

    def _near(self, tape: ir.tape.Tape, query: ir.Value, key: ir.Value, window: int) -> ir.Value:
        """``query - key < window``, ``bool [S, T]``."""
        return tape.op(
            "Less", [tape.op("Sub", [query, key]), self._constant(f"window_{window}", window)]
        )

    def _length(self, tape: ir.tape.Tape, name: str) -> ir.Value:
        source = next(value for value in self._graph.inputs if value.name == name)
        return tape.op("Squeeze", [tape.op("Shape", [source], {"start": 1, "end": 2})])

    def _constant(self, role: str, value: int | list[int]) -> ir.Value:
        return constant(self._graph, f"mask.{role}", np.array(value))
