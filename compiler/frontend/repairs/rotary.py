"""Rotary embeddings of families that pair other elements, or that rotate some layers only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from eoracc.compiler.frontend.repairs.masks import layer_windows

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["projections", "restore_rotary_layout"]

_INTERLEAVED = frozenset({"cohere", "cohere2", "ernie4_5", "glm", "glm4", "helium"})
"""Model types that rotate neighbours (2i, 2i + 1) of a head, and not (i, i + half)."""

_WINDOWED_LAYERS_ONLY = frozenset({"cohere2", "exaone4"})
"""Model types that know positions in layers with a sliding window alone.

EXAONE 4 knows them in every layer where its ``sliding_window`` is null.
"""

_ROTATED_BEFORE_NORM = frozenset({"hunyuan_v1_dense"})
"""Model types that normalise queries and keys after their rotation, and not before."""


def restore_rotary_layout(model: ir.Model, config: PretrainedConfig) -> None:
    """Make each RotaryEmbedding rotate the pairs that the family rotates, where it rotates any."""
    if config.model_type in _INTERLEAVED:
        for node in model.graph:
            if node.op_type == "RotaryEmbedding":
                node.attributes.add(ir.AttrInt64("interleaved", 1))
    attentions = [node for node in model.graph if node.op_type == "Attention"]
    if config.model_type in _ROTATED_BEFORE_NORM:
        for node in attentions:
            _rotate_before_norm(node)
    if config.model_type in _WINDOWED_LAYERS_ONLY and config.sliding_window is not None:
        for node, window in zip(attentions, layer_windows(config), strict=True):
            if not window:
                _leave_unrotated(node)


def _leave_unrotated(attention: ir.Node) -> None:
    for position in (0, 1):
        value = attention.inputs[position]
        rotary = value.producer() if value is not None else None
        if rotary is not None and rotary.op_type == "RotaryEmbedding":
            attention.replace_input_with(position, rotary.inputs[0])
            assert rotary.graph is not None  # noqa: S101 - of a graph that is walked
            rotary.graph.remove(rotary, safe=True)


def projections(attention: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The attention's query, key and value, before their rotation."""
    query, key, value = (_unrotated(operand) for operand in attention.inputs[:3])
    return query, key, value


def _unrotated(value: ir.Value | None) -> ir.Value:
    rotary = value.producer() if value is not None else None
    if rotary is not None and rotary.op_type == "RotaryEmbedding":
        value = rotary.inputs[0]
    assert value is not None  # noqa: S101 - attention and rotation have their first inputs
    return value


def _rotate_before_norm(attention: ir.Node) -> None:
    """Let a rotation read what its norm reads, and the norm read the rotation."""
    for position in (0, 1):
        value = attention.inputs[position]
        rotary = value.producer() if value is not None else None
        assert rotary is not None  # noqa: S101 - mobius rotates queries and keys of the family
        assert rotary.graph is not None  # noqa: S101
        normed = first = rotary.inputs[0]
        node = None
        while first is not None and (above := first.producer()) is not None:
            if above.op_type not in ("Reshape", "RMSNormalization"):
                break
            node, first = above, above.inputs[0]
        assert node is not None  # noqa: S101 - mobius normalises them too
        attention.replace_input_with(position, normed)
        node.replace_input_with(0, rotary.outputs[0])
        rotary.replace_input_with(0, first)
        graph = rotary.graph
        graph.remove(rotary)
        graph.insert_before(node, rotary)
