"""The output that compression took of a linear, as solvers of low-rank factors see it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.low_rank import LowRank

__all__ = ["LostOutput"]


@dataclass(frozen=True, eq=False)
class LostOutput:
    """The weight error of one linear, and the weights of its input and output directions.

    With the root ``L`` of the metric and the root ``R`` of the output's Gram, factors ``B A`` are
    to minimise ``||R (delta - B A) L||_F``.

    Attributes:
      delta: ``T - W_hat``, ``float32 [N, K]``, with the target ``T`` (:meth:`.Gram.target`).
      gram: of the input over the calibration tokens; None without calibration.
      metric: the Gram that weighs input directions, ``gram`` or one made from it; None weighs all
        inputs alike.
      output_root: ``R``, ``float32 [N, N]``; None weighs all outputs alike.
      over_tokens: ``delta`` times the root of ``gram``, ``float32 [N, K]``, if it is known already:
        its norm is the output error over the calibration tokens.

    >>> LostOutput(np.diag([2.0, 1.0]).astype(np.float32)).weighted.tolist()
    [[2.0, 0.0], [0.0, 1.0]]
    """

    delta: NDArray[np.float32]
    gram: Gram | None = None
    metric: Gram | None = None
    output_root: NDArray[np.float32] | None = None
    over_tokens: NDArray[np.float32] | None = None

    @cached_property
    def weighted(self) -> NDArray[np.float32]:
        """``delta L``, ``float32 [N, K]``; ``delta`` itself without a metric."""
        if self.metric is None:
            return self.delta
        if self.metric is self.gram and self.over_tokens is not None:
            return self.over_tokens
        return self.delta @ self.metric.root

    def remainder(self, factors: LowRank) -> LostOutput:
        """The output that is still lost once ``factors`` are added to the weight."""
        up, down = factors.up(), factors.down()
        over_tokens = None
        if self.gram is not None and self.over_tokens is not None:
            over_tokens = self.over_tokens - up @ (down @ self.gram.root)
        return replace(self, delta=self.delta - up @ down, over_tokens=over_tokens)
