"""Prune with SparseGPT: later columns make up for the weights that are removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.passes.base import register
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.prune.pruning import Pruning
from eoracc.passes.quantize.row_blocks import row_blocks
from eoracc.passes.solvers.gptq import prune_columns
from eoracc.passes.statistics import note_too_few_tokens, require_gram, saw_too_few_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.passes.solvers.sparsity import Mask, Sparsity

__all__ = ["PruneSparsegpt"]


@register
@dataclass(frozen=True, kw_only=True)
class PruneSparsegpt(Pruning):
    """Set weights to zero and let later columns make up for it (SparseGPT, arXiv:2301.00774).

    Before 'quantize_gptq' the two are one solve: weights are chosen, set to zero and rounded column
    by column, and the errors of both go into the columns to come. Runs of a 'pattern' are taken in
    the order of their activations, the largest first, columns of a 'sparsity' in that of the row,
    which leaves less error there. A linear that fewer than 32 calibration tokens reached is pruned
    by magnitude, and the report says so.

    Options:
      damping: fraction of the Gram's mean diagonal that is added to its diagonal. A joint solve has
        that of 'quantize_gptq'.
    """

    name: ClassVar[str] = "prune_sparsegpt"
    needs = (Calibrate,)

    damping: Annotated[float, Field(ge=0, le=1)] = 0.01

    @property
    @override
    def run(self) -> int:
        return self.removal.run

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
                        self.name, linear, gram, instead="pruned by magnitude", asks="SparseGPT"
                    )

    @override
    def prune(self, weight: NDArray[np.float32], gram: Gram | None) -> NDArray[np.float32]:
        if gram is None or saw_too_few_tokens(gram):
            kept = self.removal.mask_of_weights(np.abs(weight))
            return np.where(kept, weight, np.float32(0))
        removal = self.removal
        feedback = gram.feedback(
            damping=self.damping, act_order=removal.run > 0, run=max(removal.run, 1)
        )
        blocks = [
            prune_columns(weight[rows], feedback, removal) for rows in row_blocks(weight.shape)
        ]
        return blocks[0] if len(blocks) == 1 else np.concatenate(blocks)

    @override
    def choice(self, weight: NDArray[np.float32], gram: Gram | None) -> Sparsity | Mask:
        return self.removal
