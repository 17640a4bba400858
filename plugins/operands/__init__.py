"""Operands of the fused op as they are stored: packed codes, n-bit weights, low-rank factors."""
