"""Solve for one task's adapter: low-rank factors on top of a backbone that stays as it is.

The backbone has lost ``W - W_hat`` to quantization and been given back ``B A`` by its compensation.
What is left, ``W - W_hat - B A``, is another weight error, and the factors that minimise the output
error it makes on the task's own tokens are those of
:func:`~eoracc.passes.solvers.factors.eora_factors` under the Gram of those tokens. Where outputs
are matched, the target that those tokens give (:func:`~eoracc.passes.solvers.gram.output_matching`)
stands in place of ``W``.
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
    """An adapter's factors of one linear, and what they give back of its output.

    Attributes:
      factors: as they are stored.
      error_without: ``||(T - W_hat - B A) X||_F / ||T X||_F`` over the task's tokens, with the
        target ``T`` of the weight (``W`` itself where weights are matched).
      error_with: the same with the adapter's factors taken off as well.
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
      overrides: what differs by linear; the last pattern that matches wins.
    """

    rank: Rank
    factor_type: FactorType
    overrides: Mapping[str, RankOverride] = field(default_factory=dict)

    @override
    def options_for(self, linear: Linear) -> AdapterSolver | None:  # type: ignore[override]
        """The options that hold for ``linear``; None where it gets no factors.

        Adapters have slots in decoder blocks, at linears that the build compressed, and nowhere
        else.
        """
        if linear.block is None or linear.compressed is None:
            return None
        found = super().options_for(linear)
        return None if found is None or found.rank == 0 else found

    def solve(self, linear: Linear, backbone: NDArray[np.float32], gram: Gram) -> SolvedFactors:
        """Solve for one linear with the rank and type of these options.

        Args:
          linear: compressed.
          backbone: what it multiplies with before the adapter, ``W_hat + B A [N, K]``.
          gram: of its input over the task's tokens; below 32 of them the factors are those of the
            plain SVD.

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
