"""Which values of a row a parity record keeps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Sample"]


@dataclass(frozen=True)
class Sample:
    """Every ``step``-th value of a row.

    Attributes:
      size: values of the whole row.
      first: place of the first one that is kept.
      step: from one to the next.
    """

    size: int
    first: int = 0
    step: int = 1

    @property
    def count(self) -> int:
        """Values that are kept of each row."""
        return -(-self.size // self.step)

    def places(self, row: int = 0) -> NDArray[np.int64]:
        """Places of the values that are kept of a row, ``[count]``.

        Each row begins one place later, and places go on from the end to the beginning: any
        ``step`` rows in succession hold every value.

        >>> sample = Sample(size=8, first=1, step=3)
        >>> [sample.places(row).tolist() for row in range(3)]
        [[1, 4, 7], [2, 5, 0], [0, 3, 6]]
        """
        return ((self.first + row) % self.step + self.step * np.arange(self.count)) % self.size
