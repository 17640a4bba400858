"""A weight that is stored as the floats it multiplies with, zeros included."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["DenseWeight", "StoredWeight"]


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A weight of floats, for example a pruned one that no pass quantizes.

    Attributes:
      values: ``float32 [N, K]``; in Fortran order a graph, which multiplies by ``[K, N]``, holds
        them without a copy.
    """

    values: NDArray[np.float32]

    @property
    def out_features(self) -> int:
        """``N``."""
        return int(self.values.shape[0])

    @property
    def in_features(self) -> int:
        """``K``."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Stored bytes, zeros included."""
        return self.values.nbytes

    def dequantize(self) -> NDArray[np.float32]:
        """The weight that a product takes, ``float32 [N, K]``, a copy of :attr:`values`."""
        return np.array(self.values, order="C")


StoredWeight = NBitsWeight | DenseWeight
"""A compressed weight in either of its stored forms."""
