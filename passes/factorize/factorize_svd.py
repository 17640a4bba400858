"""Factorise with the plain singular value decomposition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.solvers.factorization import plain_factors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram

__all__ = ["FactorizeSvd"]


@register
@dataclass(frozen=True, kw_only=True)
class FactorizeSvd(Factorization):
    """Replace weights by their truncated SVD: every input direction counts alike."""

    name: ClassVar[str] = "factorize_svd"

    @override
    def solve(
        self, weight: NDArray[np.float32], gram: Gram | None, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        return plain_factors(weight, rank)
