"""Compensate as LQER does with its activation-induced scale (L2QER)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.compensate.scaled import ScaledCompensation
from eoracc.passes.solvers.factors import lqer_scale

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Lqer"]


@register
@dataclass(frozen=True, kw_only=True)
class Lqer(ScaledCompensation):
    """Compensate compressed linears with the SVD of their error, its columns scaled as in LQER.

    Column ``i`` counts for ``mean |x_i|`` (L2QER, arXiv:2402.02446): what 'activation_scaled' comes
    to with ``alpha: 1``.
    """

    name: ClassVar[str] = "lqer"

    @override
    def scale(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        return lqer_scale(magnitudes)
