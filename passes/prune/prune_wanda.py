"""Prune by the magnitude of weights times that of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.prune.pruning import Pruning
from eoracc.passes.statistics import note_too_few_tokens, require_gram, saw_too_few_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.passes.solvers.sparsity import Mask

__all__ = ["PruneWanda"]


@register
@dataclass(frozen=True, kw_only=True)
class PruneWanda(Pruning):
    """Set the weights of every row whose products are least to zero (Wanda, arXiv:2306.11695).

    The score of a weight is its magnitude times the norm of its input over the calibration tokens.
    The weights that stay are not changed. Every row loses the same share. A linear that fewer than
    32 calibration tokens reached is pruned by magnitude, row by row, and the report says so.
    """

    name: ClassVar[str] = "prune_wanda"
    needs = (Calibrate,)

    @override
    def requires(self, group: LinearGroup) -> None:
        super().requires(group)
        require_gram(self.name, group)

    @override
    def call(self, group: LinearGroup) -> None:
        super().call(group)
        gram = require_gram(self.name, group)
        if saw_too_few_tokens(gram):
            for _, linears in self.partition(group):
                for linear in linears:
                    note_too_few_tokens(
                        self.name, linear, gram, instead="pruned by magnitude", asks="Wanda"
                    )

    @override
    def prune(self, weight: NDArray[np.float32], gram: Gram | None) -> NDArray[np.float32]:
        return np.where(self.choice(weight, gram), weight, np.float32(0))

    @override
    def choice(self, weight: NDArray[np.float32], gram: Gram | None) -> Mask:
        scores = np.abs(weight)
        if gram is not None and not saw_too_few_tokens(gram):
            norms = np.sqrt(np.diagonal(gram.matrix))
            if (largest := norms.max()) > 0:
                # As shares of the largest: float32 holds every product.
                scores = scores * (norms / largest).astype(np.float32)
        return self.removal.mask_of_rows(scores)
