"""Factorise with the SVD of the whitened weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.factorize.activation_aware import ActivationAwareFactorization
from eoracc.passes.solvers.factorization import whitened_factors
from eoracc.passes.solvers.factors import gram_root

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram

__all__ = ["SvdLlm"]


@register
@dataclass(frozen=True, kw_only=True)
class SvdLlm(ActivationAwareFactorization):
    """Replace weights by the product of their rank that loses the least output.

    SVD-LLM, arXiv:2403.07378: the truncated SVD of ``W S``, with the Cholesky factor ``S`` of the
    Gram; a singular Gram gets a root from its eigenvectors.

    Options:
      damping: adds this fraction of the Gram's mean diagonal to its diagonal: what inputs that
        calibration did not show count for.
    """

    name: ClassVar[str] = "svd_llm"
    damping: Annotated[float, Field(ge=0)] = 0.0

    @override
    def factors(
        self, weight: NDArray[np.float32], gram: Gram, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        matrix = gram.matrix
        if self.damping:
            matrix = matrix + self.damping * np.trace(matrix) / len(matrix) * np.eye(len(matrix))
        return whitened_factors(weight, gram_root(matrix), rank)
