"""Compensate as LQER does with its activation-induced scale (L2QER)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from eoracc.compiler.errors import PassError
from eoracc.passes.base import register
from eoracc.passes.compensation import Compensation
from eoracc.passes.factors import lqer_scale, scaled_factors
from eoracc.passes.gram import Gram
from eoracc.passes.statistics import require_gram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.compiler.linears import LinearGroup

__all__ = ["Lqer"]


@register
@dataclass(frozen=True, kw_only=True)
class Lqer(Compensation):
    """Compensate compressed linears with the SVD of their error, its columns scaled as in LQER.

    Column ``i`` counts for ``mean |x_i|`` (L2QER, arXiv:2402.02446): what 'activation_scaled' comes
    to with ``alpha: 1``.

    Options:
      rank: columns of each correction; 0 turns it off.
      factor_type: what the factors are stored in; ``int8``, with a scale a row, takes half as much
        as float16, ``int4`` a quarter.
      overrides: another rank or type, or ``skip: true``, for linears by name pattern; the last
        match wins.
    """

    name: ClassVar[str] = "lqer"

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def metric(self, gram: Gram | None) -> Gram | None:
        if gram is None:
            return None
        return Gram(np.diag(lqer_scale(gram.magnitudes) ** 2), gram.tokens)

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
        return scaled_factors(delta, lqer_scale(gram.magnitudes), rank)
