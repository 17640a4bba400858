"""Compensate with the plain SVD of each linear's error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.solvers.factors import svd_factors

if TYPE_CHECKING:
    from eoracc.passes.compensate.base import Factors
    from eoracc.passes.solvers.lost_output import LostOutput

__all__ = ["Svd"]


@register
@dataclass(frozen=True, kw_only=True)
class Svd(Compensation):
    """Compensate compressed linears with the truncated SVD of their weight error.

    Needs no calibration; 'eora' does better at the same rank wherever there is some.
    """

    name: ClassVar[str] = "svd"

    @override
    def factors(self, lost: LostOutput, rank: int) -> Factors:
        return svd_factors(lost.delta, rank)
