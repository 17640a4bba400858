"""Quantize with GPTQ: every group of linears that share an input is solved at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.quantize.float16_range import range_shift, shift_scales, shifted
from eoracc.passes.quantize.quantization import Quantization
from eoracc.passes.quantize.row_blocks import row_blocks, rows_of, stack_rows
from eoracc.passes.solvers.descent import descend
from eoracc.passes.solvers.gptq import Feedback, gptq
from eoracc.passes.solvers.grid import group_width
from eoracc.passes.statistics import note_too_few_tokens, require_gram, saw_too_few_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import Linear, LinearGroup, Pruner
    from eoracc.passes.solvers.gram import Gram
    from eoracc.passes.solvers.sparsity import Mask, Sparsity
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["QuantizeGptq"]


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(Quantization):
    """Quantize with GPTQ: later columns make up for the rounding error of each column.

    Linears that share an input are solved together. A linear that fewer than 32 calibration tokens
    reached is rounded to nearest instead, and the report says so.

    Options:
      act_order: round the columns with the largest activations first.
      damping: fraction of the Gram's mean diagonal that is added to its diagonal.
      descent: rounds of coordinate descent after GPTQ. A round sets every scale and every code to
        the value that leaves the least output error given all others.
    """

    name: ClassVar[str] = "quantize_gptq"
    needs = (Calibrate,)

    act_order: bool = True
    damping: Annotated[float, Field(ge=0, le=1)] = 0.01
    descent: Annotated[int, Field(ge=0, le=100)] = 2

    @override
    def requires(self, group: LinearGroup) -> None:
        require_gram(self.name, group)

    @override
    def call(self, group: LinearGroup) -> None:
        gram = require_gram(self.name, group)
        super().call(group)
        for options, linears in self.partition(group):
            for linear in linears:
                run = 1 if linear.pruner is None else linear.pruner.run
                feedback = options.feedback(gram, run=run)
                options.note(linear, gram, feedback)

    @override
    def compress(
        self, weights: Iterable[NDArray[np.float32]], gram: Gram | None
    ) -> Iterator[NBitsWeight]:
        weights = list(weights)
        shifts = [range_shift(weight, bits=self.bits) for weight in weights]
        stack = self.solve(
            np.concatenate([shifted(*pair) for pair in zip(weights, shifts, strict=True)]), gram
        )
        start = 0
        for weight, shift in zip(weights, shifts, strict=True):
            yield shift_scales(rows_of(stack, slice(start, start + len(weight))), -shift)
            start += len(weight)

    @override
    def solve(self, weight: NDArray[np.float32], gram: Gram | None) -> NBitsWeight:
        feedback = None if gram is None else self.feedback(gram)
        if gram is None or feedback is None:
            return self.round_to_nearest(weight)
        return self._solved(weight, gram, feedback)

    @override
    def solve_pruned(
        self, weight: NDArray[np.float32], gram: Gram | None, pruner: Pruner
    ) -> NBitsWeight:
        feedback = None if gram is None else self.feedback(gram, run=pruner.run)
        if gram is None or feedback is None:
            return self.round_to_nearest(pruner.prune(weight, gram))
        return self._solved(weight, gram, feedback, pruner.choice(weight, gram))

    def _solved(
        self,
        weight: NDArray[np.float32],
        gram: Gram,
        feedback: Feedback,
        pruning: Sparsity | Mask | None = None,
    ) -> NBitsWeight:
        def solve(rows: slice) -> NBitsWeight:
            part = weight[rows]
            solved = gptq(
                part,
                feedback,
                bits=self.bits,
                group_size=group_width(self.group_size, part.shape[1]),
                symmetric=self.symmetric,
                clip_search=self.clip_search,
                pruning=pruning[rows] if isinstance(pruning, np.ndarray) else pruning,
            )
            return descend(
                part,
                solved,
                gram.matrix,
                sweeps=self.descent,
                damping=feedback.damping,
                keep_zeros=pruning is not None,
            )

        return stack_rows([solve(rows) for rows in row_blocks(weight.shape)])

    def feedback(self, gram: Gram, *, run: int = 1) -> Feedback | None:
        """Factor ``gram`` for GPTQ; None where it saw too few tokens.

        Args:
          gram: of the input.
          run: consecutive columns that stay together in the order of the columns; 0 for all.
        """
        if saw_too_few_tokens(gram):
            return None
        act_order = self.act_order and run > 0
        return gram.feedback(damping=self.damping, act_order=act_order, run=run if act_order else 1)

    def note(self, linear: Linear, gram: Gram, feedback: Feedback | None) -> None:
        """Note on ``linear`` where its solution differs from what the options ask for."""
        if feedback is None:
            note_too_few_tokens(self.name, linear, gram, instead="rounded to nearest", asks="GPTQ")
        elif feedback.damping > self.damping:
            linear.record.notes.append(
                f"{self.name}: damping raised from {self.damping:g} to {feedback.damping:g}, "
                "for its gram is singular."
            )
