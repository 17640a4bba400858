"""Factorise with the SVD of the activation-scaled weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.factorize.activation_aware import ActivationAwareFactorization
from eoracc.passes.solvers.factorization import activation_scaled_factors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram

__all__ = ["FactorizeActivationScaled"]


@register
@dataclass(frozen=True, kw_only=True)
class FactorizeActivationScaled(ActivationAwareFactorization):
    """Replace weights by the truncated SVD of themselves times how large their inputs are.

    ASVD, arXiv:2312.05821, with the same ratio for every weight.

    Options:
      alpha: 0 weighs all inputs alike, 1 by their mean magnitude.
    """

    name: ClassVar[str] = "factorize_activation_scaled"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    @override
    def factors(
        self, weight: NDArray[np.float32], gram: Gram, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        return activation_scaled_factors(weight, gram.magnitudes, rank, alpha=self.alpha)
