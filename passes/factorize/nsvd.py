"""Factorise in two nested stages, by activations and by the weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.factorize.activation_aware import ActivationAwareFactorization
from eoracc.passes.solvers.factorization import NESTED_SHARE, nested_factors
from eoracc.passes.solvers.factors import gram_root

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram

__all__ = ["Nsvd"]


@register
@dataclass(frozen=True, kw_only=True)
class Nsvd(ActivationAwareFactorization):
    """Replace weights by a whitened SVD of most of the rank, and a plain SVD of what that leaves.

    NSVD, arXiv:2503.17101, in its first form (NSVD-I). 'erc_svd' has the same two stages and
    counts the second one's rank by the weight's parameters.

    Options:
      share: of the rank that goes to the first stage; 1 is 'svd_llm', 0 'factorize_svd'.
    """

    name: ClassVar[str] = "nsvd"
    share: Annotated[float, Field(ge=0, le=1)] = NESTED_SHARE

    @override
    def factors(
        self, weight: NDArray[np.float32], gram: Gram, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        return nested_factors(weight, gram_root(gram.matrix), rank, share=self.share)
