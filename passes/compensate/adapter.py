"""Solve for the adapter of one task: low-rank factors on top of a fixed backbone.

Quantization took ``W - W_hat`` from the backbone, and its compensation restored ``B A``. The rest,
``W - W_hat - B A``, is another weight error. The factors that minimise its output error over the
tokens of the task are those of :func:`~eoracc.passes.solvers.factors.eora_factors` under the Gram
of those tokens. If outputs are matched, the target of those tokens
(:func:`~eoracc.passes.solvers.gram.output_matching`) replaces ``W``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from eoracc.passes.compensate.base import Rank, RankOverride, check_rank
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.overrides import Overridable
from eoracc.passes.solvers.factor_types import FactorType
from eoracc.passes.solvers.lost_output import LostOutput

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = ["AdapterSolver", "SolvedFactors"]


@dataclass(frozen=True, eq=False)
class SolvedFactors:
    """Factors of an adapter for one linear, with the output errors without and with them.

    Attributes:
      factors: as they are stored.
      error_without: ``||(T - W_hat - B A) X||_F / ||T X||_F`` over the task's tokens, with the
        target ``T`` of the weight (``W`` itself where weights are matched).
      error_with: the same error once the adapter's factors are added to the backbone.
    """

    factors: LowRank
    error_without: float
    error_with: float


@dataclass(frozen=True, kw_only=True)
class AdapterSolver(Overridable):
    """The options of an adapter.

    Attributes:
      rank: columns of its factors.
      factor_type: what they are stored in.
      overrides: options for linears by name pattern; the last match wins.
    """

    rank: Rank
    factor_type: FactorType
    overrides: Mapping[str, RankOverride] = field(default_factory=dict)

    @override
    def options_for(self, linear: Linear) -> AdapterSolver | None:  # type: ignore[override]
        """The options for ``linear``; None if it gets no factors.

        An adapter has a slot at each linear of a decoder block that the build compressed.
        """
        if linear.block is None or linear.quantized is None:
            return None
        options = super().options_for(linear)
        return None if options is None or options.rank == 0 else options

    def solve(self, linear: Linear, backbone: NDArray[np.float32], gram: Gram) -> SolvedFactors:
        """Solve for one linear with the rank and type of these options.

        Args:
          linear: compressed.
          backbone: its weight without the adapter, ``W_hat + B A [N, K]``.
          gram: of its input over the task's tokens; with fewer than 32 tokens the factors come from
            the plain SVD.

        Raises:
          PassError: the rank exceeds the weight's smaller side.
        """
        check_rank(linear, self.rank)
        weight = gram.target(linear.weight())
        delta: NDArray[np.float32] = weight - backbone
        error: NDArray[np.float32] = delta @ gram.root
        solver = Eora(rank=self.rank, factor_type=self.factor_type)
        factors = solver.solve(LostOutput(delta, gram, solver.metric(gram), over_tokens=error))
        left: NDArray[np.float32] = error - factors.up() @ (factors.down() @ gram.root)
        output = float(np.linalg.norm(weight @ gram.root))
        return SolvedFactors(factors, _relative(error, output), _relative(left, output))


def _relative(error: NDArray[np.float32], output: float) -> float:
    return float(np.linalg.norm(error)) / output if output > 0 else 0.0
