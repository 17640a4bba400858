"""Base of the passes that restore lost output with low-rank factors of each linear's error.

:class:`Compensation` walks the linears; a subclass implements the solver, ``factors``.
:func:`compensation_solver` gives a solver by name, so that a build can compare its factors with
those of another pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import LayerPass, Pass, pass_type
from eoracc.passes.compression import Compression
from eoracc.passes.overrides import Overridable, Override
from eoracc.passes.solvers.factor_types import FactorType, store_factors
from eoracc.passes.solvers.lost_output import LostOutput
from eoracc.passes.statistics import lost_output, record_error

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = [
    "Compensation",
    "Factors",
    "Rank",
    "RankOverride",
    "Solver",
    "check_rank",
    "compensation_solver",
]

Rank = Annotated[int, Field(ge=0)]

Factors = tuple[NDArray[np.float64], NDArray[np.float64]]
"""``B [N, R]`` and ``A [R, K]``."""

Solver = Callable[["Linear", "Gram | None", int, FactorType], "LowRank"]
"""``solve(linear, gram, rank, factor_type)``: factors of the error of a compressed linear."""


@dataclass(frozen=True, kw_only=True)
class RankOverride(Override):
    """Options of a compensating pass for the linears of one pattern."""

    rank: Rank | None = None
    factor_type: FactorType | None = None


@dataclass(frozen=True, kw_only=True)
class Compensation(Overridable, LayerPass):
    """Base of the passes that add low-rank factors to compressed linears.

    If an earlier compensating pass gave a linear factors, the new ones are solved for the error
    that those leave, and are appended to them.

    Options:
      rank: columns of each correction; 0 turns it off.
      factor_type: what the factors are stored in; ``int8``, with a scale per row, takes half the
        bytes of float16, ``int4`` a quarter. At equal bytes ``int4`` leaves the least error with
        'eora'.
    """

    needs: ClassVar[tuple[type[Pass], ...]] = (Compression,)
    comparable: ClassVar[bool] = True
    """Whether :meth:`solve` alone gives the factors that a build with this pass would ship."""

    rank: Rank = 64
    factor_type: FactorType = "int4"
    overrides: Mapping[str, RankOverride] = field(default_factory=dict)

    @abstractmethod
    def factors(self, lost: LostOutput, rank: int) -> Factors:
        """Solve for low-rank factors of the error of one linear.

        Args:
          lost: the error, ``[N, K]``, with the weights of its directions (:meth:`metric`).
          rank: the largest that the factors may have.

        Returns:
          ``B [N, R]`` and ``A [R, K]``, ``R`` at most ``rank``.

        Raises:
          PassError: the pass needs a Gram, and there is none.
        """

    def metric(self, gram: Gram) -> Gram | None:
        """The Gram that the pass weighs errors by; None weighs all inputs alike."""
        del gram
        return None

    @override
    def call(self, group: LinearGroup) -> None:
        for options, linears in self.partition(group):
            for linear in linears:
                if linear.compressed is None and linear.record.errors:
                    continue  # an override kept the quantizing pass from changing it
                if options.rank or linear.factors is None:
                    earlier = linear.factors
                    check_rank(linear, options.joined_rank(0 if earlier is None else earlier.rank))
                    lost = options.lost_output(linear, group.gram)
                    factors = options.solve(lost, earlier=earlier)
                    # No factors of rank 0: integer ones would still store a scale per row.
                    linear.compensate(factors if factors.rank else None)
                if group.gram is not None:
                    record_error(self.name, linear, group.gram)

    def joined_rank(self, earlier: int) -> int:
        """The rank of a linear's factors after this pass.

        Args:
          earlier: rank of the factors that passes before this one gave it.
        """
        return earlier + self.rank

    def lost_output(self, linear: Linear, gram: Gram | None) -> LostOutput:
        """The output that ``linear`` lost to quantization, weighed as the pass weighs errors.

        Args:
          linear: compressed.
          gram: of its input, if statistics were taken.

        Raises:
          PassError: the linear is not compressed.
        """
        if linear.compressed is None:
            raise PassError(
                linear.name,
                f"is not compressed: put a quantize pass before {self.name!r}, "
                "or leave the linear out with 'skip: true' in its overrides",
            )
        if gram is None:
            return LostOutput(linear.weight() - linear.compressed.dequantize())
        return replace(lost_output(linear, gram), metric=self.metric(gram))

    def solve(self, lost: LostOutput, *, earlier: LowRank | None = None) -> LowRank:
        """Low-rank factors of an error as they are stored, by the rank and type of these options.

        Args:
          lost: the error of a backbone, whose earlier factors are not part of it.
          earlier: factors of a pass before this one. The new ones are solved for the error that
            these leave, and are appended to them.
        """
        if earlier is None:
            b, a = self.factors(lost, self.rank)
        else:
            b, a = self.factors(lost.remainder(earlier), self.rank)
            b, a = np.hstack([earlier.up(), b]), np.vstack([earlier.down(), a])
        if self.factor_type != "int4":
            return store_factors(b, a, self.factor_type)
        # Rounding to four bits weighs errors once more, by a root that may take an eigh to compute.
        return store_factors(b, a, self.factor_type, gram=lost.metric, weighted=lost.weighted)


def check_rank(linear: Linear, rank: int) -> None:
    """Check that factors of ``linear`` can have ``rank``.

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
    """The solver of the compensating pass ``name``, with the pass's default options.

    Raises:
      KeyError: no compensating pass has that name.
    """
    method = pass_type(name)
    if not issubclass(method, Compensation):
        raise KeyError(name)

    def solve(linear: Linear, gram: Gram | None, rank: int, factor_type: FactorType) -> LowRank:
        check_rank(linear, rank)
        options = method(rank=rank, factor_type=factor_type)
        return options.solve(options.lost_output(linear, gram))

    return solve
