"""Compensate with each input direction weighted by how large activations are along it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.compiler.errors import PassError
from eoracc.passes.base import register
from eoracc.passes.compensation import Compensation
from eoracc.passes.factors import activation_scale, scaled_factors
from eoracc.passes.gram import Gram
from eoracc.passes.statistics import require_gram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.compiler.linears import LinearGroup

__all__ = ["ActivationScaled"]


@register
@dataclass(frozen=True, kw_only=True)
class ActivationScaled(Compensation):
    """Compensate compressed linears with the SVD of their error, its columns scaled as in ASVD.

    Column ``i`` counts for ``(mean |x_i|)^alpha`` (arXiv:2312.05821). 'eora' knows how inputs go
    together, not just how large each one is, and leaves less of each linear's output error.

    Options:
      rank: columns of each correction; 0 turns it off.
      alpha: 0 scales nothing, as 'svd'; 1 scales by the activations, as 'lqer'.
      factor_type: what the factors are stored in; ``int8``, with a scale a row, takes half as much
        as float16, ``int4`` a quarter.
      overrides: another rank or type, or ``skip: true``, for linears by name pattern; the last
        match wins.
    """

    name: ClassVar[str] = "activation_scaled"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5

    def scale(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        """What an error counts for by its column, ``[K]``, given ``mean |x_i|``."""
        return activation_scale(magnitudes, self.alpha)

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def metric(self, gram: Gram | None) -> Gram | None:
        if gram is None:
            return None
        return Gram(np.diag(self.scale(gram.magnitudes) ** 2), gram.tokens)

    @override
    def factors(
        self,
        delta: NDArray[np.float32],
        gram: Gram | None,
        rank: int,
        *,
        weighted: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if gram is None:
            raise PassError(self.name, "has no activations to go by: put 'calibrate' before it")
        return scaled_factors(delta, self.scale(gram.magnitudes), rank)
