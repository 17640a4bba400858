"""What compressed linears will take, from their shapes alone: the figures of the report."""

from __future__ import annotations

from eoracc.passes.factor_types import FactorType
from eoracc.passes.grid import group_width

__all__ = ["factor_bytes", "weight_bytes"]

_SCALE_BYTES = 2
"""Of a group: float16."""
_ROW_SCALE_BYTES = 4
"""Of a row of an integer factor: float32."""
_FACTOR_BITS = {"float16": 16, "int8": 8, "int4": 4}


def weight_bytes(
    out_features: int, in_features: int, *, bits: int, group_size: int, symmetric: bool
) -> int:
    """Bytes of a quantized weight, :attr:`.NBitsWeight.nbytes`: whole groups, scales, zero points.

    >>> weight_bytes(2, 20, bits=3, group_size=16, symmetric=False)
    36
    """
    width = group_width(group_size, in_features)
    groups = -(-in_features // width)
    per_group = width * bits // 8 + _SCALE_BYTES + (0 if symmetric else 1)
    return out_features * groups * per_group


def factor_bytes(out_features: int, in_features: int, rank: int, factor_type: FactorType) -> int:
    """Bytes of low-rank factors, :attr:`.LowRank.nbytes`: both of them, and the scales of rows.

    >>> factor_bytes(10, 20, 4, "int4"), factor_bytes(10, 20, 0, "int4")
    (116, 0)
    """
    if not rank:
        return 0
    bits = _FACTOR_BITS[factor_type]
    values = sum(-(-side * rank * bits // 8) for side in (out_features, in_features))
    scales = 0 if factor_type == "float16" else _ROW_SCALE_BYTES * (out_features + rank)
    return values + scales
