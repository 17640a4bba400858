"""How long the texts of a model may be, where its rotary embedding limits them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from eoracc.compiler.frontend.rope_parameters import rope_sections
from eoracc.runtime.artifact.long_rope import LongRope

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PretrainedConfig

__all__ = ["context_notes"]


def context_notes(config: PretrainedConfig, metadata: Mapping[str, str]) -> list[str]:
    """Sentences for the report; none where the context has no special limit.

    Args:
      config: transformers' configuration.
      metadata: of the graph.
    """
    long_rope = LongRope.of(metadata)
    if long_rope is not None:
        note = (
            f"texts have up to {long_rope.longest} tokens in eoracc on the CPU; in unmodified "
            f"onnxruntime-genai and in TensorRT up to {long_rope.original}, beyond which LongRoPE "
            "changes the keys of a cache"
        )
        return [note]
    sections = rope_sections(config)
    if any(section.get("rope_type") == "dynamic" for section in sections):
        note = (
            f"texts have up to {config.max_position_embeddings} tokens (max_position_embeddings): "
            "beyond, dynamic NTK changes the keys of a cache with every token"
        )
        return [note]
    return []
