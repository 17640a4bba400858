"""Passes that give back what compression took: low-rank factors of each linear's error.

:class:`Compensation` walks the linears; a subclass brings the solver. Solvers are also on offer by
name (:func:`compensation_solver`), so that a build can be compared with the factors that another
one would have shipped.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import LayerPass, pass_type
from eoracc.passes.overrides import Overridable, Override
from eoracc.passes.solvers.factor_types import FactorType, store_factors
from eoracc.passes.statistics import record_error, residual_of

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = [
    "Compensation",
    "Rank",
    "RankOverride",
    "Solver",
    "check_rank",
    "compensation_solver",
]

Rank = Annotated[int, Field(ge=0)]

Solver = Callable[["Linear", "Gram | None", int, FactorType], "LowRank"]
"""``solve(linear, gram, rank, factor_type)``: factors of the error of a compressed linear."""


@dataclass(frozen=True, kw_only=True)
class RankOverride(Override):
    """What a compensating pass may do differently for some linears."""

    rank: Rank | None = None
    factor_type: FactorType | None = None


@dataclass(frozen=True, kw_only=True)
class Compensation(Overridable, LayerPass):
    """Base of the passes that add low-rank factors to compressed linears.

    Where a linear has factors already, of a compensating pass before this one, the new ones are of
    what those leave, and follow them.
    """

    rank: Rank = 64
    factor_type: FactorType = "int4"
    overrides: Mapping[str, RankOverride] = field(default_factory=dict)

    @abstractmethod
    def factors(
        self,
        delta: NDArray[np.float32],
        gram: Gram | None,
        rank: int,
        *,
        weighted: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Solve for the factors of one error.

        Args:
          delta: the error, ``[N, K]``: what the target has lost (:meth:`.Gram.target`).
          gram: of the input, where statistics were taken.
          rank: of the factors, the largest that they may have.
          weighted: ``delta @ gram.root``, where there is a Gram.

        Returns:
          ``B [N, R]`` and ``A [R, K]``, ``R`` at most ``rank``.

        Raises:
          PassError: the pass needs a Gram, and there is none.
        """

    @override
    def call(self, group: LinearGroup) -> None:
        for options, linears in self.partition(group):
            for linear in linears:
                if linear.compressed is None and linear.errors:
                    continue  # a quantizing pass left it as it is, by an override
                if options.rank or linear.factors is None:
                    factors = self.solve(
                        linear,
                        group.gram,
                        options.rank,
                        options.factor_type,
                        before=linear.factors,
                    )
                    # None of rank 0: integer ones would have the scales of their rows still.
                    linear.compensate(factors if factors.rank else None)
                if group.gram is not None:
                    record_error(self.name, linear, group.gram)

    def solve(
        self,
        linear: Linear,
        gram: Gram | None,
        rank: int,
        factor_type: FactorType,
        *,
        before: LowRank | None = None,
    ) -> LowRank:
        """Factors of the error of ``linear``'s backbone, as they are stored.

        Args:
          linear: compressed.
          gram: of its input, where statistics were taken.
          rank: of the factors.
          factor_type: what all of them are stored in.
          before: those of an earlier stage: the new ones are of what these leave, and follow them.

        Raises:
          PassError: the linear is not compressed, or the rank exceeds its smaller side.
        """
        check_rank(linear, rank + (0 if before is None else before.rank))
        if linear.compressed is None:
            raise PassError(
                linear.name,
                f"is not compressed: put a quantize pass before {self.name!r}, "
                "or leave the linear out with 'skip: true' in its overrides",
            )
        if gram is None:
            delta, weighted = linear.weight() - linear.compressed.dequantize(), None
        else:
            residual = residual_of(linear, gram)
            delta, weighted = residual.delta, residual.weighted
        return self.solve_error(
            linear, delta, gram, rank, factor_type, weighted=weighted, before=before
        )

    def solve_error(
        self,
        linear: Linear,
        delta: NDArray[np.float32],
        gram: Gram | None,
        rank: int,
        factor_type: FactorType,
        *,
        weighted: NDArray[np.float32] | None,
        before: LowRank | None = None,
    ) -> LowRank:
        """As :meth:`solve`, of an error ``delta [N, K]`` of any backbone.

        ``weighted`` is ``delta @ gram.root``, where there is a Gram.
        """
        if before is None:
            b, a = self.factors_for(linear, delta, gram, rank, weighted=weighted)
        else:
            up, down = before.up(), before.down()
            b, a = self.factors_for(
                linear,
                delta - up @ down,
                gram,
                rank,
                weighted=None
                if weighted is None or gram is None
                else weighted - up @ (down @ gram.root),
            )
            b, a = np.hstack([up, b]), np.vstack([down, a])
        if factor_type != "int4":
            return store_factors(b, a, factor_type)
        # Rounding to four bits weighs errors once more, in a metric that may take an eigh to make.
        metric = self.metric(gram)
        lost: NDArray[np.floating] | None = weighted
        if metric is None:
            lost = delta
        elif metric is not gram:
            lost = delta @ metric.root
        return store_factors(b, a, factor_type, gram=metric, weighted=lost)

    def factors_for(
        self,
        linear: Linear,
        delta: NDArray[np.float32],
        gram: Gram | None,
        rank: int,
        *,
        weighted: NDArray[np.float32] | None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """:meth:`factors`, for a pass that knows more of ``linear`` than its error."""
        del linear
        return self.factors(delta, gram, rank, weighted=weighted)

    def metric(self, gram: Gram | None) -> Gram | None:
        """The Gram that the pass weighs errors by; None weighs all inputs alike."""
        del gram
        return None


def check_rank(linear: Linear, rank: int) -> None:
    """Refuse a rank that the factors of ``linear`` cannot have.

    Raises:
      PassError: it exceeds the weight's smaller side.
    """
    limit = min(linear.out_features, linear.in_features)
    if rank > limit:
        raise PassError(
            linear.name,
            f"rank {rank} exceeds the smaller side of its "
            f"[{linear.out_features}, {linear.in_features}] weight: "
            f"give {limit} at most, by an override if need be",
        )


def compensation_solver(name: str) -> Solver:
    """The solver of the compensating pass ``name``, with the options that it has by itself.

    Raises:
      KeyError: no compensating pass has that name.
    """
    found = pass_type(name)
    if not issubclass(found, Compensation):
        raise KeyError(name)
    return found().solve
