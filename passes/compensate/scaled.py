"""Base of the passes that weigh an error by the magnitude of each input."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compression import Compression
from eoracc.passes.solvers.factors import scaled_factors
from eoracc.passes.solvers.gram import Gram
from eoracc.passes.statistics import require_gram

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.compensate.base import Factors
    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.lost_output import LostOutput

__all__ = ["ScaledCompensation"]


@dataclass(frozen=True, kw_only=True)
class ScaledCompensation(Compensation):
    """Base of the passes that take the SVD of an error with its columns scaled."""

    needs = (Calibrate, Compression)

    @abstractmethod
    def scale(self, magnitudes: NDArray[np.float64]) -> NDArray[np.float64]:
        """Weights of the columns of an error, ``[K]``, from ``mean |x_i|``."""

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def metric(self, gram: Gram) -> Gram | None:
        return Gram(np.diag(self.scale(gram.magnitudes) ** 2), gram.tokens)

    @override
    def factors(self, lost: LostOutput, rank: int) -> Factors:
        if lost.gram is None:
            raise PassError(self.name, "has no activations to go by: put 'calibrate' before it")
        return scaled_factors(lost.delta, self.scale(lost.gram.magnitudes), rank)
