"""Factors that the configuration sets and the graph rounds or leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from eoracc.passes.graph.tensors import register_tensor

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["restore_attention_scale", "restore_embedding_scale"]


def restore_embedding_scale(model: ir.Model, config: PretrainedConfig) -> None:
    """Give Gemma's embedding scale, ``sqrt(hidden_size)``, its float32 value.

    mobius rounds it to two decimals (Gemma, Gemma 2) or to float16 (Gemma 3), which eager float32
    does not; the difference of 1e-4 would reach every logit through the residual.
    """
    exact = np.float32(config.hidden_size**0.5)
    rounded = (float(np.float16(exact)), float(np.float32(round(config.hidden_size**0.5, 2))))
    for gather in [node for node in model.graph if node.op_type == "Gather"]:
        for use in gather.outputs[0].uses():
            scale = use.node.inputs[1] if use.node.op_type == "Mul" else None
            if scale is None or scale.const_value is None or scale.const_value.size != 1:
                continue
            stored = scale.const_value.numpy()
            if stored.item() in rounded and stored.item() != float(exact):
                tensor = ir.tensor(np.full(stored.shape, exact), name=f"{scale.name}.float32")
                use.node.replace_input_with(1, register_tensor(model.graph, tensor))
                if not scale.uses():
                    del model.graph.initializers[str(scale.name)]


def restore_attention_scale(model: ir.Model, config: PretrainedConfig) -> None:
    """Scale scores by ``query_pre_attn_scalar ** -0.5`` where the configuration says so (Gemma).

    mobius takes the head dimension instead, which Gemma3 27B does not have there.
    """
    scalar = getattr(config, "query_pre_attn_scalar", None)
    if not scalar:
        return
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes.add(ir.AttrFloat32("scale", float(scalar) ** -0.5))
