"""Names that several stages of the compiler share."""

from __future__ import annotations

from types import MappingProxyType

__all__ = ["LOGITS_TO_KEEP", "PARTS", "ROPE_LENGTHS", "ROPE_ROWS", "TOKENS", "WINDOW_KEY"]

PARTS = MappingProxyType(
    {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
)
"""Role of a packed weight (of some families and of ``pack_projections``) to the roles of its parts,
in the order of their rows."""

TOKENS = "input_ids"
"""Input of a model with its tokens, ``int64 [B, S]``."""

WINDOW_KEY = "eoracc.local_window_size"
"""Node metadata of an ``Attention``: the number of keys that a query attends to, its own included;
0 means all."""

LOGITS_TO_KEEP = "logits_to_keep"
"""Input of a lowered decoder: how many of each row's last tokens get logits; 1 unless given."""

ROPE_LENGTHS = "rope.lengths"
"""Value in the graph of a LongRoPE model, ``int64 [B, 1]``: each row's length, which decides by
which tables it is rotated."""

ROPE_ROWS = "rope.rows"
"""Value in the graph of a LongRoPE model, ``int64 [B, S]``: rows of its tables, the positions
themselves where the row is short."""
