"""Compensate with the factors that minimise each linear's output error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.errors import ConfigError, PassError
from eoracc.passes.base import register
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compression import Compression
from eoracc.passes.solvers.factors import (
    energy_rank,
    eora_factors,
    output_weighted_factors,
    svd_factors,
)
from eoracc.passes.statistics import (
    note_too_few_tokens,
    output_root,
    require_gram,
    saw_too_few_tokens,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.compensate.base import Factors
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.passes.solvers.lost_output import LostOutput

__all__ = ["Eora"]


@register
@dataclass(frozen=True, kw_only=True)
class Eora(Compensation):
    """Compensate compressed linears with the low-rank factors that restore most of their output.

    Closed form (arXiv:2410.21271), no training. A linear whose input fewer than 32 calibration
    tokens reached gets the plain SVD of its error instead, and the report says so.

    Options:
      energy: share of the error's energy that may be left. A linear then gets the smallest rank
        that leaves no more, and ``rank`` at most; null gives all of them ``rank``.
      energy_of: whose energy that is. ``error``: squared singular values of the weighted error, so
        that factors leave at most this share of it. ``gram``: eigenvalues of the input's Gram, so
        that linears with one input get one rank, whatever their errors. Few tokens (above) always
        go by the error.
      directions: weigh errors by the top so many eigenvectors of the input's Gram alone, and leave
        what tokens do outside of them out of account; null takes all.
      weigh_outputs: whether outputs count for what ``calibrate_outputs`` has found, where it stands
        before the sweep. Recorded errors are of the plain output either way.
    """

    name: ClassVar[str] = "eora"
    needs = (Calibrate, Compression)

    energy: Annotated[float, Field(ge=0, le=1)] | None = None
    energy_of: Literal["error", "gram"] = "error"
    directions: Annotated[int, Field(ge=1)] | None = None
    weigh_outputs: bool = True

    def __post_init__(self) -> None:
        """Check that there is a share of the Gram's energy where that is to be gone by.

        Raises:
          ConfigError: there is none.
        """
        if self.energy_of == "gram" and self.energy is None:
            raise ConfigError(
                f"{self.name!r} has no share for 'energy_of: gram': give 'energy', or leave it out"
            )

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def call(self, group: LinearGroup) -> None:
        gram = require_gram(self.name, group)
        super().call(group)
        if saw_too_few_tokens(gram):
            for linear in group.linears:
                if linear.factors is not None:
                    note_too_few_tokens(
                        self.name, linear, gram, instead="plain SVD of the error", asks="EoRA"
                    )

    @override
    def metric(self, gram: Gram) -> Gram | None:
        if saw_too_few_tokens(gram):
            return None
        return gram if self.directions is None else gram.top(self.directions)

    @override
    def lost_output(self, linear: Linear, gram: Gram | None) -> LostOutput:
        lost = super().lost_output(linear, gram)
        if gram is None or lost.metric is None or not self.weigh_outputs:
            return lost
        return replace(lost, output_root=output_root(linear, gram))

    @override
    def factors(self, lost: LostOutput, rank: int) -> Factors:
        if lost.gram is None:
            raise PassError(self.name, "has no gram to go by: put 'calibrate' before it")
        if self.energy is not None and self.energy_of == "gram" and lost.metric is not None:
            values = lost.metric.eigenvalues
            rank = energy_rank(values[:rank], float(values.sum()), self.energy)
        if lost.metric is None:
            b, a = svd_factors(lost.delta, rank)
        elif lost.output_root is None:
            b, a = eora_factors(lost.delta, lost.metric.matrix, rank, weighted=lost.weighted)
        else:
            b, a = output_weighted_factors(
                lost.delta, lost.metric.matrix, lost.output_root, rank, weighted=lost.weighted
            )
        if self.energy is None or (self.energy_of == "gram" and lost.metric is not None):
            return b, a
        rank = _rank_for_energy(b, a, lost, self.energy)
        return b[:, :rank], a[:rank]


def _rank_for_energy(
    b: NDArray[np.float64], a: NDArray[np.float64], lost: LostOutput, energy: float
) -> int:
    """The least rank at which ``b`` and ``a`` leave at most the share ``energy`` of the error."""
    left: NDArray[np.floating] = b
    right: NDArray[np.floating] = a if lost.metric is None else a @ lost.metric.root
    error = lost.weighted
    if lost.output_root is not None:
        left, error = lost.output_root @ b, lost.output_root @ error
    singular = np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=1)
    return energy_rank(singular**2, float(np.linalg.norm(error)) ** 2, energy)
