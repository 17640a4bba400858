"""Quantize with GPTQ: every group of linears that share an input is solved at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import LayerPass, register
from eoracc.passes.overrides import Bits, GroupSize, Overridable, QuantizeOverride
from eoracc.passes.solvers.descent import descend
from eoracc.passes.solvers.gptq import Feedback, gptq
from eoracc.passes.solvers.grid import round_to_nearest
from eoracc.passes.statistics import (
    note_too_few_tokens,
    record_error,
    record_left_out,
    require_gram,
    saw_too_few_tokens,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["QuantizeGptq"]


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(Overridable, LayerPass):
    """Quantize with GPTQ: each column's rounding error is made good by the columns after it.

    Linears that share an input are solved together. One whose input fewer than 32 calibration
    tokens reached is rounded to nearest instead, and the report says so.

    Options:
      bits: width of a code.
      group_size: columns that share a scale, a multiple of 8 in 16..256, or -1 for whole rows.
      symmetric: store no zero points.
      act_order: round the columns with the largest activations first.
      damping: fraction of the Gram's mean diagonal that is added to its diagonal.
      clip_search: look for the range of each group that costs least, not just its extremes.
      descent: how often every scale and every code is looked at again once GPTQ is done, each time
        taking the value that leaves the least output error given all others.
      overrides: other options, or ``skip: true``, for linears by name pattern; the last match wins.
    """

    name: ClassVar[str] = "quantize_gptq"
    bits: Bits = 4
    group_size: GroupSize = 64
    symmetric: bool = False
    act_order: bool = True
    damping: Annotated[float, Field(ge=0, le=1)] = 0.01
    clip_search: bool = True
    descent: Annotated[int, Field(ge=0, le=100)] = 2
    overrides: Mapping[str, QuantizeOverride] = field(default_factory=dict)

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def call(self, group: LinearGroup) -> None:
        gram = require_gram(self.name, group)
        parts = self.partition(group)
        factored = self._feedback(gram) if parts else None
        for options, linears in parts:
            weights = [gram.target(linear.weight()) for linear in linears]
            solved = options.solve(np.concatenate(weights), gram, factored)
            start = 0
            for linear, weight in zip(linears, weights, strict=True):
                linear.quantize(_rows(solved, start, start + len(weight)))
                start += len(weight)
                linear.quantizer = options
                self._note(linear, gram, factored)
                record_error(self.name, linear, gram)
        record_left_out(self.name, group)

    def requantize(self, weight: NDArray[np.float32], gram: Gram) -> NBitsWeight:
        """Quantize another weight ``[N, K]`` on the input of ``gram``."""
        return self.solve(weight, gram, self._feedback(gram))

    def solve(
        self, weight: NDArray[np.float32], gram: Gram, factored: Feedback | None
    ) -> NBitsWeight:
        """Quantize ``weight [N, K]``, to nearest where ``gram`` is not to be gone by."""
        if factored is None:
            return round_to_nearest(
                weight,
                bits=self.bits,
                group_size=self.group_size,
                symmetric=self.symmetric,
                clip_search=self.clip_search,
            )
        solved = gptq(
            weight,
            factored,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            clip_search=self.clip_search,
        )
        return descend(weight, solved, gram.matrix, sweeps=self.descent, damping=factored.damping)

    def _feedback(self, gram: Gram) -> Feedback | None:
        """What GPTQ needs of ``gram``; None where it saw too few tokens to go by."""
        if saw_too_few_tokens(gram):
            return None
        return gram.feedback(damping=self.damping, act_order=self.act_order)

    def _note(self, linear: Linear, gram: Gram, factored: Feedback | None) -> None:
        if factored is None:
            note_too_few_tokens(self.name, linear, gram, instead="rounded to nearest", asks="GPTQ")
        elif factored.damping > self.damping:
            linear.notes.append(
                f"{self.name}: damping raised from {self.damping:g} to {factored.damping:g}, "
                "for its gram is singular."
            )


def _rows(weight: NBitsWeight, start: int, stop: int) -> NBitsWeight:
    zero_points = weight.zero_points
    return replace(
        weight,
        packed=weight.packed[start:stop],
        scales=weight.scales[start:stop],
        zero_points=None if zero_points is None else zero_points[start:stop],
    )
