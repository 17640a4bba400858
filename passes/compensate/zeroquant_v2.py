"""Compensate as ZeroQuant-V2 does (LoRC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from eoracc.passes.base import register
from eoracc.passes.compensate.base import Rank
from eoracc.passes.compensate.svd import Svd

__all__ = ["ZeroQuantV2"]


@register
@dataclass(frozen=True, kw_only=True)
class ZeroQuantV2(Svd):
    """Compensate compressed linears as ZeroQuant-V2 does: low-rank compensation, LoRC.

    The truncated SVD of the weight error, singular values shared out evenly between the factors
    (arXiv:2303.08302): the same as 'svd', under the name and the rank of the paper.
    """

    name: ClassVar[str] = "zeroquant_v2"
    rank: Rank = 8
