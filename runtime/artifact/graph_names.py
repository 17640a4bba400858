"""Names in an artifact's graphs: inputs, outputs and metadata of nodes."""

from __future__ import annotations

__all__ = [
    "LINEARS_KEY",
    "LOGITS_POSITIONS",
    "LOGITS_TO_KEEP",
    "LORA_A",
    "LORA_B",
    "PAST",
    "PRESENT",
    "TEXT_LENGTHS",
    "WRITE_INDICES",
]

PAST = "past_key_values."
"""Beginning of the names of inputs with keys and values, ``past_key_values.<i>.key|value``."""

PRESENT = "present."
"""Beginning of the names of outputs with keys and values, ``present.<i>.key|value``."""

LOGITS_TO_KEEP = "logits_to_keep"
"""Optional input for ONNX Runtime: of how many last tokens of a row to give the logits; or 1."""

LOGITS_POSITIONS = "logits_positions"
"""Input for TensorRT, ``int64 [B, L]``: positions among the tokens of a call that get logits."""

WRITE_INDICES = "write_indices"
"""Input for TensorRT, ``int64 [B]``, with a cache in place: first column of a row's new tokens."""

TEXT_LENGTHS = "text_lengths"
"""Optional input for ONNX Runtime of a LongRoPE model, ``int64 [B, 1]``: length of each row when
all of its prompt is processed; or 0, for its length so far."""

LORA_A = ".lora_a"
"""End of the names of an adapter's inputs for TensorRT, ``<linear>.lora_a [R, K]``."""

LORA_B = ".lora_b"
"""End of the names of an adapter's inputs for TensorRT, ``<linear>.lora_b [N, R]``."""

LINEARS_KEY = "eoracc.linears"
"""Node metadata of a fused op: names of the linears in it, in the order of their rows."""
