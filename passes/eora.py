"""Compensate with the factors that minimise each linear's output error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from eoracc.compiler.errors import PassError
from eoracc.passes.base import register
from eoracc.passes.compensation import Compensation
from eoracc.passes.factors import eora_factors, svd_factors
from eoracc.passes.statistics import MIN_TOKENS, require_gram, saw_too_few_tokens

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.compiler.linears import LinearGroup
    from eoracc.passes.gram import Gram

__all__ = ["Eora"]


@register
@dataclass(frozen=True, kw_only=True)
class Eora(Compensation):
    """Compensate compressed linears with the low-rank factors that restore most of their output.

    Closed form (arXiv:2410.21271), no training. A linear whose input fewer than 32 calibration
    tokens reached gets the plain SVD of its error instead, and the report says so.

    Options:
      rank: columns of each correction; 0 turns it off.
      factor_type: what the factors are stored in; ``int8``, with a scale a row, takes half as much
        as float16, ``int4`` a quarter.
      overrides: another rank or type, or ``skip: true``, for linears by name pattern; the last
        match wins.
    """

    name: ClassVar[str] = "eora"

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def call(self, group: LinearGroup) -> bool:
        gram = require_gram(self.name, group)
        changed = super().call(group)
        if saw_too_few_tokens(gram):
            for linear in group.linears:
                if linear.factors is not None:
                    linear.notes.append(
                        f"{self.name}: plain SVD of the error, for only {gram.tokens:.0f} "
                        f"calibration tokens reached it (EoRA asks for {MIN_TOKENS})."
                    )
        return changed

    @classmethod
    @override
    def metric(cls, gram: Gram | None) -> Gram | None:
        return None if gram is None or saw_too_few_tokens(gram) else gram

    @classmethod
    @override
    def factors(
        cls,
        delta: NDArray[np.float32],
        gram: Gram | None,
        rank: int,
        *,
        weighted: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        if gram is None:
            raise PassError(cls.name, "has no gram to go by: put 'calibrate' before it")
        if saw_too_few_tokens(gram):
            return svd_factors(delta, rank)
        return eora_factors(delta, gram.matrix, rank, weighted=weighted)
