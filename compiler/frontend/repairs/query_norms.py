"""Cohere's norms of queries and keys, which have a weight for each head (Command R+)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.compiler.frontend.repairs.rotary import projections
from eoracc.errors import ModelError
from eoracc.passes.graph.tensors import constant, register_tensor

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from numpy.typing import NDArray
    from transformers import PretrainedConfig

__all__ = ["add_query_norms"]


def add_query_norms(
    model: ir.Model, config: PretrainedConfig, folder: Path, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Normalise queries and keys before they are rotated, where the configuration says so.

    mobius has one weight for all heads, so that the graph was built without these norms.

    Raises:
      ModelError: the checkpoint lacks a weight, or has one of another shape.
    """
    if config.model_type != "cohere" or not config.use_qk_norm:
        return
    graph = model.graph
    attentions = [node for node in graph if node.op_type == "Attention"]
    for layer, attention in enumerate(attentions):
        query, key, _ = projections(attention)
        for role, value, heads in (
            ("q_norm", query, config.num_attention_heads),
            ("k_norm", key, config.num_key_value_heads),
        ):
            name = f"model.layers.{layer}.self_attn.{role}.weight"
            weight = tensors.get(name)
            if weight is None or len(weight) != heads:
                raise ModelError(
                    f"{folder}: the checkpoint has no tensor {name} of {heads} heads, which its "
                    "config asks for"
                )
            tensor = register_tensor(graph, ir.tensor(weight.float().numpy(), name=name))
            _normalise(graph, value, tensor, epsilon=config.layer_norm_eps)


def _normalise(graph: ir.Graph, value: ir.Value, weight: ir.Value, *, epsilon: float) -> None:
    """Norm of each head of ``value [B, S, heads * size]``, times ``weight [heads, size]``."""
    assert weight.const_value is not None  # noqa: S101 - has just been registered
    heads, size = weight.const_value.numpy().shape
    readers = list(value.uses())
    tape = ir.tape.Tape()
    split = tape.op("Reshape", [value, _constant(graph, f"split_{heads}", [0, 0, heads, size])])
    ones = _constant(graph, "ones", np.ones(size, np.float32))
    normed = tape.op(
        "LayerNormalization", [split, ones], {"axis": -1, "epsilon": epsilon}, name=weight.name
    )
    scaled = tape.op("Mul", [normed, weight])
    merged = tape.op("Reshape", [scaled, _constant(graph, "merge", [0, 0, -1])])
    for step in (split, normed, scaled):
        step.type = value.type
        step.shape = ir.Shape(["batch", "sequence_len", heads, size])
    merged.type, merged.shape = value.type, value.shape
    source = value.producer()
    assert source is not None  # noqa: S101 - projections are computed
    graph.insert_after(source, tape.nodes)
    for reader, position in readers:
        reader.replace_input_with(position, merged)


def _constant(graph: ir.Graph, role: str, content: list[int] | NDArray[np.float32]) -> ir.Value:
    return constant(graph, f"query_norms.{role}", np.array(content))
