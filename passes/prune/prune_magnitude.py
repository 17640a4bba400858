"""Prune the weights of least magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.prune.pruning import Pruning

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram
    from eoracc.passes.solvers.sparsity import Mask

__all__ = ["PruneMagnitude"]


@register
@dataclass(frozen=True, kw_only=True)
class PruneMagnitude(Pruning):
    """Set the weights of least magnitude of every linear to zero.

    Needs no calibration. A 'sparsity' is that of the whole linear: rows of small weights lose more.
    """

    name: ClassVar[str] = "prune_magnitude"

    @override
    def prune(self, weight: NDArray[np.float32], gram: Gram | None) -> NDArray[np.float32]:
        return np.where(self.choice(weight, gram), weight, np.float32(0))

    @override
    def choice(self, weight: NDArray[np.float32], gram: Gram | None) -> Mask:
        return self.removal.mask_of_weights(np.abs(weight))
