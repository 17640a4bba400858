"""Factorise with a whitened SVD and an SVD of the residual that its truncation leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import register
from eoracc.passes.factorize.activation_aware import ActivationAwareFactorization
from eoracc.passes.solvers.factors import gram_root
from eoracc.passes.solvers.residual_compensation import (
    Metric,
    adaptive_residual_rank,
    erc_factors,
    residual_rank,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram

__all__ = ["ErcSvd"]


def _one_sentence(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """What ``check`` makes of ``value``, with one message for both kinds that it may be."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError(
            "pass_beta",
            "must be a number in 0..1 or 'adaptive', not {value}",
            {"value": str(value)},
        ) from None


Beta = Annotated[
    Annotated[float, Field(ge=0, le=1)] | Literal["adaptive"], WrapValidator(_one_sentence)
]


@register
@dataclass(frozen=True, kw_only=True)
class ErcSvd(ActivationAwareFactorization):
    """Replace weights by a whitened SVD, and a plain SVD of the residual of its truncation.

    ERC-SVD, arXiv:2505.20112. Of the rank ``r = (1 - ratio) m n / (m + n)`` the residual gets
    ``beta m n / (m + n)``. The paper's other half, which compresses the last layers alone, is the
    survey 'select_last_k', put before the sweep.

    Options:
      beta: the residual's factors, as a share of the weight's parameters; 0 is 'svd_llm'.
        ``adaptive`` chooses it for each weight, at the same rank in total.
      residual_metric: ``weight`` takes the plain SVD of the residual; ``activation`` weighs it by
        the Gram again, which is one SVD in two steps: 'svd_llm'.
      stages: 2 as in the paper; more share the residual's rank out to stages by turns plain and by
        the Gram; 1 is 'svd_llm'.
    """

    name: ClassVar[str] = "erc_svd"
    beta: Beta = 0.05
    residual_metric: Metric = "weight"
    stages: Annotated[int, Field(ge=1)] = 2

    def __post_init__(self) -> None:
        """Refuse options that say different things of the residual.

        Raises:
          PassError: ``beta: adaptive`` is combined with another metric or number of stages.
        """
        if self.beta == "adaptive" and (self.residual_metric != "weight" or self.stages != 2):
            raise PassError(
                self.name,
                "'beta: adaptive' splits the rank between two stages, the second of them plain: "
                "leave 'residual_metric' and 'stages' out, or give 'beta' a number",
            )

    @override
    def factors(
        self, weight: NDArray[np.float32], gram: Gram, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        root = gram_root(gram.matrix)
        if self.beta == "adaptive":
            residual = adaptive_residual_rank(weight, root, rank)
        else:
            residual = residual_rank(self.beta, rank, *weight.shape)
        return erc_factors(
            weight, root, rank, residual, metric=self.residual_metric, stages=self.stages
        )
