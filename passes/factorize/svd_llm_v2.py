"""Factorise with the SVD of the whitened weight, whitened by eigenvectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.factorize.activation_aware import ActivationAwareFactorization
from eoracc.passes.solvers.factorization import spectral_root, whitened_factors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram

__all__ = ["SvdLlmV2"]


@register
@dataclass(frozen=True, kw_only=True)
class SvdLlmV2(ActivationAwareFactorization):
    """Replace weights by the product of their rank that loses the least output.

    SVD-LLM V2, arXiv:2503.12340: the truncated SVD of ``W U sqrt(S)`` with ``H = U S U^T``, which
    any Gram has. At one ratio it gives what 'svd_llm' gives. The paper's other half, a ratio for
    each weight, is the survey 'allocate_ratios', put before the sweep.
    """

    name: ClassVar[str] = "svd_llm_v2"

    @override
    def factors(
        self, weight: NDArray[np.float32], gram: Gram, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        return whitened_factors(weight, spectral_root(gram.matrix), rank)
