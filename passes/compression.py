"""Passes that store the weight of a linear in fewer bytes: quantization, and pruning.

:class:`Compression` walks the linears and puts the stored weights in the graph; a subclass brings
the solver. Compensating passes and adapters build on the result, whichever pass it is of.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from typing_extensions import override

from eoracc.passes.base import LayerPass, Pass, Problem
from eoracc.passes.overrides import Overridable
from eoracc.passes.statistics import record_error, record_left_out

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.dense import StoredWeight

__all__ = ["Compression", "Compressor"]


class Compressor(Protocol):
    """Compresses weights: a pass with its options, or two passes together."""

    def requantize(self, weight: NDArray[np.float32], gram: Gram | None) -> StoredWeight:
        """Compress one weight; see :meth:`Compression.requantize`."""

    def compress(
        self, weights: Iterable[NDArray[np.float32]], gram: Gram | None
    ) -> Iterable[StoredWeight]:
        """Compress several weights; see :meth:`Compression.compress`."""


@dataclass(frozen=True, kw_only=True)
class Compression(Overridable, LayerPass):
    """Base of the passes that replace the weight of a linear by a smaller stored one."""

    stores_codes: ClassVar[bool] = True
    """Whether the weight is stored in codes, and not in floats with zeros."""

    @abstractmethod
    def requantize(self, weight: NDArray[np.float32], gram: Gram | None) -> StoredWeight:
        """Compress one weight.

        Args:
          weight: to be approximated, ``[N, K]``.
          gram: of the input, where statistics were taken.
        """

    @abstractmethod
    def code_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of a compressed ``[N, K]`` weight: codes, scales and zero points.

        Args:
          out_features: ``N``.
          in_features: ``K``.
        """

    def compress(
        self, weights: Iterable[NDArray[np.float32]], gram: Gram | None
    ) -> Iterable[StoredWeight]:
        """Compress the weights of linears that share an input and all options, in their order."""
        return (self.requantize(weight, gram) for weight in weights)

    def solvers(self, linears: Sequence[Linear]) -> Iterator[tuple[Compressor, Sequence[Linear]]]:
        """What compresses each of ``linears``, which share these options."""
        yield self, linears

    @override
    def call(self, group: LinearGroup) -> None:
        gram = group.gram
        for options, members in self.partition(group):
            for compressor, linears in options.solvers(members):
                weights = (linear.weight() for linear in linears)
                targets = weights if gram is None else map(gram.target, weights)
                stored = compressor.compress(targets, gram)
                for linear, weight in zip(linears, stored, strict=True):
                    linear.quantize(weight)
                    linear.quantizer = compressor
                    if gram is not None:
                        record_error(self.name, linear, gram)
        record_left_out(self.name, group)

    @override
    def problems(self, earlier: Sequence[Pass]) -> Iterator[Problem]:
        yield from super().problems(earlier)
        for other in earlier:
            if not isinstance(other, Compression) or other.name == self.name:
                continue
            if isinstance(other, self.precedes):
                continue  # the base has said so
            if other.stores_codes or not self.stores_codes:
                yield (
                    (),
                    f"the weights are compressed already by '{other.name}': keep one of the two",
                )
