"""The parameters of a rotary embedding, which types of layers may have apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["rope_sections"]


def rope_sections(config: PretrainedConfig) -> list[Mapping[str, Any]]:
    """The parameters of the rotary embedding, once for each type of layer that has its own."""
    rope = getattr(config, "rope_parameters", None) or {}
    if not isinstance(rope, Mapping):
        return []
    nested = [section for section in rope.values() if isinstance(section, Mapping)]
    return nested or ([rope] if rope else [])
