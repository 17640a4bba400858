"""Names that several stages of the compiler share."""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["LOGITS_TO_KEEP", "PARTS", "WINDOW_KEY"]

PARTS = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
)
"""Role of a packed weight (of some families and of ``pack_projections``) to the roles of its parts,
in the order of their rows."""

WINDOW_KEY = "eoracc.local_window_size"
"""Node metadata of an ``Attention``: the number of keys that a query attends to, its own included;
0 means all."""

LOGITS_TO_KEEP = "logits_to_keep"
"""Input of a lowered decoder: how many of each row's last tokens get logits; 1 unless given."""
