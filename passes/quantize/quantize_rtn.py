"""Round every weight to the nearest code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.quantize.quantization import Quantization

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["QuantizeRtn"]


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeRtn(Quantization):
    """Round every weight to the nearest code, one linear at a time.

    Needs no calibration. After 'calibrate', the clipping search weighs each column by the size of
    its activations.
    """

    name: ClassVar[str] = "quantize_rtn"

    @override
    def solve(self, weight: NDArray[np.float32], gram: Gram | None) -> NBitsWeight:
        return self.round_to_nearest(
            weight, importance=None if gram is None else np.diagonal(gram.matrix)
        )
