"""Compensate with each input direction weighted by how large activations are along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.compensate.scaled import ScaledCompensation
from eoracc.passes.solvers.factors import activation_scale

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["ActivationScaled"]


@register
@dataclass(frozen=True, kw_only=True)
class ActivationScaled(ScaledCompensation):
    """Compensate compressed linears with the SVD of their error, its columns scaled as in ASVD.

    Column ``i`` counts for ``(mean |x_i|)^alpha`` (arXiv:2312.05821). 'eora' knows how inputs go
    together, not just how large each one is, and leaves less of each linear's output error.

    Options:
      alpha: 0 scales nothing, as 'svd'; 1 scales by the activations, as 'lqer'.
    """

    name: ClassVar[str] = "activation_scaled"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    @override
    def scale(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        return activation_scale(magnitudes, self.alpha)
