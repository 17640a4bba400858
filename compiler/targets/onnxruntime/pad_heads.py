"""Pad attention heads with zeros to a size that the fused attention takes.

ONNX Runtime's ``GroupQueryAttention`` wants head sizes in multiples of 8; open_llama_3b has 100.
Zeros at the end of a query or a key change no score, and zeros at the end of a value give zeros,
which are cut off again. Keys and values are cached with their padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.tensors import constant

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["HEAD_MULTIPLE", "pad_heads"]

HEAD_MULTIPLE = 8
"""What the head size of a fused attention is a multiple of."""


def pad_heads(graph: ir.Graph, attentions: Iterable[ir.Node]) -> None:
    """Pad the heads of ``attentions`` to the next multiple of :data:`HEAD_MULTIPLE`.

    Args:
      graph: changed in place; its inputs and outputs of the cache get the padded size.
      attentions: decoder attentions of ``graph`` over its cache.
    """
    for node in attentions:
        past = node.inputs[4]
        size = None if past is None or past.shape is None else past.shape[3]
        if not isinstance(size, int) or size % HEAD_MULTIPLE == 0:
            continue
        padded = -(-size // HEAD_MULTIPLE) * HEAD_MULTIPLE
        _pad_operands(graph, node, size, padded)
        _cut_output(graph, node, size, padded)
        for cache in (*node.inputs[4:6], *node.outputs[1:3]):
            if cache is not None and cache.shape is not None:
                cache.shape = ir.Shape([*cache.shape[:3], padded])
        if node.attributes.get_float("scale", 0.0) <= 0:
            # The default is derived from the size, which is another one now.
            node.attributes.add(ir.AttrFloat32("scale", size**-0.5))


def _pad_operands(graph: ir.Graph, node: ir.Node, size: int, padded: int) -> None:
    query_heads, kv_heads = (
        node.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")
    )
    tape = ir.tape.Tape()
    pads = _constant(graph, f"pad_{padded - size}", [0] * 7 + [padded - size])
    for position, heads in enumerate((query_heads, kv_heads, kv_heads)):
        value = node.inputs[position]
        assert value is not None  # noqa: S101 - an attention has its first three inputs
        split = tape.op(
            "Reshape", [value, _constant(graph, f"split_{heads}x{size}", [0, 0, heads, size])]
        )
        longer = tape.op("Pad", [split, pads])
        merged = tape.op("Reshape", [longer, _constant(graph, "merge", [0, 0, -1])])
        _describe(merged, value, heads * padded)
        node.replace_input_with(position, merged)
    graph.insert_before(node, tape.nodes)


def _cut_output(graph: ir.Graph, node: ir.Node, size: int, padded: int) -> None:
    heads = node.attributes["q_num_heads"].as_int()
    mixed = node.outputs[0]
    uses = list(mixed.uses())
    tape = ir.tape.Tape()
    split = tape.op(
        "Reshape", [mixed, _constant(graph, f"split_{heads}x{padded}", [0, 0, heads, padded])]
    )
    cut = tape.op(
        "Slice",
        [
            split,
            _constant(graph, "first", [0]),
            _constant(graph, f"size_{size}", [size]),
            _constant(graph, "axis", [3]),
        ],
    )
    merged = tape.op("Reshape", [cut, _constant(graph, "merge", [0, 0, -1])])
    _describe(merged, mixed, heads * size)
    _describe(mixed, mixed, heads * padded)
    graph.insert_after(node, tape.nodes)
    for user, position in uses:
        user.replace_input_with(position, merged)


def _describe(value: ir.Value, like: ir.Value, width: int) -> None:
    value.type = like.type
    if like.shape is not None:
        value.shape = ir.Shape([*like.shape[:-1], width])


def _constant(graph: ir.Graph, role: str, content: list[int]) -> ir.Value:
    return constant(graph, f"heads.{role}", np.array(content, np.int64))
