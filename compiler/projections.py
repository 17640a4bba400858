"""Projections that share one input and are stored as one weight by some families."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["PARTS"]

PARTS: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Role of the stored whole to the roles of its parts, in the order in which their rows lie."""
