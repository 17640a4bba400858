"""Base of the passes that factorise weights by the Gram of their inputs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.solvers.factorization import plain_factors
from eoracc.passes.statistics import note_too_few_tokens, require_gram, saw_too_few_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Gram

__all__ = ["ActivationAwareFactorization"]


@dataclass(frozen=True, kw_only=True)
class ActivationAwareFactorization(Factorization):
    """Factorise by a Gram, or by the plain SVD where too few tokens reached a linear."""

    needs = (Calibrate,)

    @abstractmethod
    def factors(
        self, weight: NDArray[np.float32], gram: Gram, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """``u [N, rank]`` and ``v [rank, K]`` of ``weight``, by a Gram of enough tokens."""

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def call(self, group: LinearGroup) -> None:
        gram = require_gram(self.name, group)
        super().call(group)
        if saw_too_few_tokens(gram):
            for linear in group.linears:
                if linear.factorized is not None:
                    note_too_few_tokens(
                        self.name, linear, gram, instead="plain SVD of the weight", asks=self.name
                    )

    @override
    def solve(
        self, weight: NDArray[np.float32], gram: Gram | None, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        if gram is None:
            raise PassError(self.name, "has no gram to go by: put 'calibrate' before it")
        if saw_too_few_tokens(gram):
            return plain_factors(weight, rank)
        return self.factors(weight, gram, rank)
