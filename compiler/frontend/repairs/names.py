"""Names of parameters that mobius changes, back to the checkpoint's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir
    from transformers import PretrainedConfig

__all__ = ["restore_names"]

_NAMES: Mapping[str, Sequence[tuple[str, str]]] = MappingProxyType(
    {
        "apertus": (
            (".input_layernorm.", ".attention_layernorm."),
            (".post_attention_layernorm.", ".feedforward_layernorm."),
        ),
        "hunyuan_v1_dense": (
            (".q_norm.", ".query_layernorm."),
            (".k_norm.", ".key_layernorm."),
        ),
        "phi": (
            (".self_attn.o_proj.", ".self_attn.dense."),
            (".mlp.up_proj.", ".mlp.fc1."),
            (".mlp.down_proj.", ".mlp.fc2."),
        ),
        "starcoder2": ((".mlp.up_proj.", ".mlp.c_fc."), (".mlp.down_proj.", ".mlp.c_proj.")),
    }
)
"""By model type, a part of mobius's name and what the checkpoint has in its place."""


def restore_names(model: ir.Model, config: PretrainedConfig) -> None:
    """Name parameters as the checkpoint and the eager model do."""
    for mine, own in _NAMES.get(config.model_type, ()):
        for name, value in list(model.graph.initializers.items()):
            if mine in name:
                value.name = name.replace(mine, own)
