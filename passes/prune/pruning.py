"""Base of the passes that set weights to zero: a share of them, or all but N of every M.

A pruned weight stays in floats, unless a quantizing pass follows in the same sweep. That pass then
solves for codes and zeros together, or rounds the pruned weight (docs/passes/pruning.md).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
from pydantic import BeforeValidator, Field
from typing_extensions import override

from eoracc.errors import ConfigError, PassError
from eoracc.passes.compression import Compression
from eoracc.passes.overrides import Override
from eoracc.passes.quantize.quantization import Quantization
from eoracc.passes.solvers.sparsity import Sparsity
from eoracc.plugins.operands.dense import DenseWeight
from eoracc.printable import quoted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.passes.solvers.sparsity import Mask

__all__ = ["Fraction", "Pattern", "PruneOverride", "Pruning"]

_VALUE_BYTES = 4
"""Of a weight that is stored in floats."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""Share of the weights that is removed."""


def _check_pattern(pattern: object) -> object:
    kept, _, run = pattern.partition(":") if isinstance(pattern, str) else ("", "", "")
    if run in ("2", "4", "8") and kept in map(str, range(1, int(run))):
        return pattern
    raise ValueError(
        f"{quoted(pattern)} is no pattern: give 'N:M' in quotation marks, which keeps N of every M "
        "weights, with M of 2, 4 or 8 and N from 1 to M - 1"
    )


Pattern = Annotated[str, BeforeValidator(_check_pattern)]
"""``N:M``: of every M consecutive weights of a row, N are kept."""


@dataclass(frozen=True, kw_only=True)
class PruneOverride(Override):
    """Options of a pruning pass for the linears of one pattern of names."""

    sparsity: Fraction | None = None
    pattern: Pattern | None = None

    def __post_init__(self) -> None:
        """Check that there is one of the two at most.

        Raises:
          ConfigError: there are both.
        """
        if self.sparsity is not None and self.pattern is not None:
            raise ConfigError("an override has 'sparsity' or 'pattern', not both: remove one")


@dataclass(frozen=True, kw_only=True)
class Pruning(Compression):
    """Base of the passes that prune linears of decoder blocks.

    Options:
      sparsity: share of the weights of a linear that become zero, at least 0 and below 1.
      pattern: "N:M" keeps N of every M consecutive weights of a row ("2:4", "4:8"), in place of
        ``sparsity``; null leaves their places free. In an override each of the two replaces the
        other. M must divide the row.
    """

    precedes = (Quantization,)
    stores_codes = False

    sparsity: Fraction = 0.5
    pattern: Pattern | None = None
    overrides: Mapping[str, PruneOverride] = field(default_factory=dict)

    @abstractmethod
    def prune(self, weight: NDArray[np.float32], gram: Gram | None) -> NDArray[np.float32]:
        """Prune one weight.

        Args:
          weight: ``[N, K]``.
          gram: of the input, where statistics were taken.

        Returns:
          ``float32 [N, K]`` with exact zeros for what is removed.
        """

    @abstractmethod
    def choice(self, weight: NDArray[np.float32], gram: Gram | None) -> Sparsity | Mask:
        """What a joint solve with a quantizing pass is to remove of ``weight [N, K]``.

        Returns:
          A mask, ``bool [N, K]``, or how much the solve is to remove by a choice of its own.
        """

    @property
    def run(self) -> int:
        """Columns that a joint solve must keep together; 0 for all, in the order of the row."""
        return 1

    @property
    def removal(self) -> Sparsity:
        """How many weights are removed, and from where."""
        if self.pattern is None:
            return Sparsity(fraction=self.sparsity)
        return Sparsity.of_pattern(self.pattern)

    @override
    def requires(self, group: LinearGroup) -> None:
        for options, linears in self.partition(group):
            run = options.removal.run
            for linear in linears:
                if linear.block is None:
                    raise PassError(
                        linear.name,
                        "stands outside the decoder blocks, where nothing is pruned: take the "
                        f"pattern that names it out of the overrides of {self.name!r}",
                    )
                if run and linear.in_features % run:
                    raise PassError(
                        linear.name,
                        f"has rows of {linear.in_features} weights, no multiple of {run} as the "
                        f"pattern {options.pattern} needs: give it 'sparsity' or 'skip: true' in "
                        f"the overrides of {self.name!r}",
                    )

    @override
    def call(self, group: LinearGroup) -> None:
        super().call(group)
        for options, linears in self.partition(group):
            for linear in linears:
                linear.pruner = options
                weight = linear.compressed
                assert weight is not None  # noqa: S101 - the base has just pruned it
                zeros = np.count_nonzero(weight.dequantize() == 0)
                linear.record.sparsity = float(zeros / (linear.out_features * linear.in_features))

    @override
    def options_for(self, linear: Linear | Embedding) -> Self | None:
        options = super().options_for(linear)
        matching = self._matching(linear)
        if options is None or not matching:
            return options
        chosen = self.overrides[matching[-1]]
        if chosen.sparsity is not None:
            return replace(options, pattern=None)
        return options

    @override
    def requantize(self, weight: NDArray[np.float32], gram: Gram | None) -> DenseWeight:
        return DenseWeight(np.asfortranarray(self.prune(weight, gram)))

    @override
    def code_bytes(self, out_features: int, in_features: int) -> int:
        return _VALUE_BYTES * out_features * in_features
