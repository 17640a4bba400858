"""Passes that replace a weight by a product of two smaller ones.

:class:`Factorization` walks the linears and puts the factors in the graph; a subclass brings the
solver. A weight ``W [N, K]`` becomes ``u [N, r]`` times ``v [r, K]``, two matmuls of their own,
which later passes may quantize and compensate like any other.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import LayerPass
from eoracc.passes.overrides import Overridable, Override
from eoracc.passes.solvers.factorization import factorized_rank
from eoracc.passes.statistics import record_error

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Gram

__all__ = ["Factorization", "Ratio", "RatioOverride"]

Ratio = Annotated[float, Field(ge=0, lt=1)]
"""Share of a weight's parameters that is removed, ``R_l``."""


@dataclass(frozen=True, kw_only=True)
class RatioOverride(Override):
    """Options of a factorising pass for the linears of one pattern."""

    ratio: Ratio | None = None


@dataclass(frozen=True, kw_only=True)
class Factorization(Overridable, LayerPass):
    """Base of the passes that factorise linears.

    Options:
      ratio: share of a weight's parameters that is removed; 0 leaves it as it is.
    """

    calibrate_options: ClassVar[Mapping[str, str]] = {}
    """Options that the pass needs 'calibrate' to have."""

    ratio: Ratio = 0.2
    overrides: Mapping[str, RatioOverride] = field(default_factory=dict)

    @abstractmethod
    def solve(
        self, weight: NDArray[np.float32], gram: Gram | None, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Factorise one weight.

        Args:
          weight: the weight to approximate, ``[N, K]`` (:meth:`target`).
          gram: of the input, where statistics were taken.
          rank: of the product, in ``1..min(N, K)``.

        Returns:
          ``u [N, rank]`` and ``v [rank, K]``.

        Raises:
          PassError: the pass needs a Gram, and there is none.
        """

    def target(self, weight: NDArray[np.float32], gram: Gram | None) -> NDArray[np.float32]:
        """The weight that the product approximates, ``[N, K]``."""
        return weight if gram is None else gram.target(weight)

    @override
    def call(self, group: LinearGroup) -> None:
        for options, linears in self.partition(group):
            if options.ratio == 0:
                continue
            for linear in linears:
                weight = options.target(linear.weight(), group.gram)
                rank = factorized_rank(linear.out_features, linear.in_features, options.ratio)
                u, v = options.solve(weight, group.gram, rank)
                linear.factorize(u.astype(np.float32), v.astype(np.float32))
                if group.gram is not None:
                    record_error(self.name, linear, group.gram)
