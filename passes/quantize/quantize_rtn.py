"""Round every weight to the nearest code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from typing_extensions import override

from eoracc.passes.base import LayerPass, register
from eoracc.passes.overrides import Bits, GroupSize, Overridable, QuantizeOverride
from eoracc.passes.solvers.grid import round_to_nearest
from eoracc.passes.statistics import record_error, record_left_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["QuantizeRtn"]


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeRtn(Overridable, LayerPass):
    """Round every weight to the nearest code, one linear at a time.

    Needs no calibration; where 'calibrate' stands before it, the clipping search weighs each
    column by how large its activations are.

    Options:
      bits: width of a code.
      group_size: columns that share a scale, a multiple of 8 in 16..256, or -1 for whole rows.
      symmetric: store no zero points.
      clip_search: look for the range of each group that costs least, not just its extremes.
      overrides: other options, or ``skip: true``, for linears by name pattern; the last match wins.
    """

    name: ClassVar[str] = "quantize_rtn"
    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: bool = False
    clip_search: bool = True
    overrides: Mapping[str, QuantizeOverride] = field(default_factory=dict)

    @override
    def call(self, group: LinearGroup) -> None:
        gram = group.gram
        for options, linears in self.partition(group):
            for linear in linears:
                weight = linear.weight() if gram is None else gram.target(linear.weight())
                linear.quantize(options.requantize(weight, gram))
                linear.quantizer = options
                if gram is not None:
                    record_error(self.name, linear, gram)
        record_left_out(self.name, group)

    def requantize(self, weight: NDArray[np.float32], gram: Gram | None) -> NBitsWeight:
        """Round a weight ``[N, K]``, its columns weighed by ``gram`` where there is one."""
        return round_to_nearest(
            weight,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            importance=None if gram is None else np.diagonal(gram.matrix),
            clip_search=self.clip_search,
        )
