"""Limits of values that the configuration sets and the graph leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.compiler.frontend.repairs.rotary import projections
from eoracc.passes.graph.tensors import register_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["restore_clipping", "restore_logit_cap"]


def restore_logit_cap(model: ir.Model, config: PretrainedConfig) -> None:
    """Cap logits at ``final_logit_softcapping`` (Gemma 3): ``cap * tanh(logits / cap)``."""
    graph = model.graph
    cap = getattr(config, "final_logit_softcapping", None)
    logits = graph.outputs[0]
    if not cap or _is_capped(logits):
        return
    head = logits.producer()
    assert head is not None  # noqa: S101 - logits are computed
    (uncapped,) = head.outputs
    uncapped.name = f"{logits.name}.uncapped"
    limit = register_tensor(graph, ir.tensor(np.array(cap, np.float32), name="logits.cap"))
    tape = ir.tape.Tape()
    bounded = tape.op("Tanh", [tape.op("Div", [uncapped, limit])])
    capped = tape.op("Mul", [bounded, limit], name="logits/cap")
    for node in tape.nodes:
        node.outputs[0].type, node.outputs[0].shape = uncapped.type, uncapped.shape
    capped.name = "logits"
    graph.insert_after(head, tape.nodes)
    graph.outputs[0] = capped


def _is_capped(logits: ir.Value) -> bool:
    """Whether a Tanh stands between the head and the logits (Gemma 2)."""
    node = logits.producer()
    while node is not None and node.op_type != "MatMul":
        if node.op_type == "Tanh":
            return True
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return False


def restore_clipping(model: ir.Model, config: PretrainedConfig) -> None:
    """Clip queries, keys and values to ``[-clip_qkv, clip_qkv]`` before they are rotated (OLMo)."""
    limit = getattr(config, "clip_qkv", None)
    if limit is None:
        return
    graph = model.graph
    bounds = [
        register_tensor(graph, ir.tensor(np.array(bound, np.float32), name=f"clip_qkv.{role}"))
        for role, bound in (("min", -limit), ("max", limit))
    ]
    for attention in [node for node in graph if node.op_type == "Attention"]:
        for value in projections(attention):
            source = value.producer()
            assert source is not None  # noqa: S101 - projections are computed
            clip = ir.node("Clip", [value, *bounds], name=f"{source.name}/clip")
            (clipped,) = clip.outputs
            clipped.name = f"{value.name}.clipped"
            clipped.type, clipped.shape = value.type, value.shape
            value.replace_all_uses_with(clipped)
            clip.replace_input_with(0, value)
            graph.insert_after(source, clip)
