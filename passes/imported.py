"""Take over the weights of a checkpoint that somebody else has compressed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import numpy as np
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import ModelPass, Pass, Problem, register
from eoracc.passes.compression import Compression
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.graph.linears import Linear
from eoracc.passes.quantize.quantization import EmbeddingBits, GroupSize
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.passes.statistics import record_error, record_left_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["Imported"]


@register
@dataclass(frozen=True, kw_only=True)
class Imported(Compression):
    """Take over the weights of the checkpoint that 'compressed' names, bit by bit.

    Stands where a quantizing pass would: compensations after it give back what the checkpoint has
    lost of 'model'. Codes, scales and zero points stay as they are; where the op cannot hold them
    the weight is kept in floats of the same values, and the report says so.

    Options:
      embedding_bits: round the token embeddings and the head to codes of this width where the
        checkpoint has them in floats; null, the default, leaves them as they are. A head that is
        tied to the embeddings shares their codes.
      embedding_group_size: columns of them that share a scale: a multiple of 8 in 16..256, -1 for
        whole rows, or ``auto``.
    """

    name: ClassVar[str] = "imported"

    embedding_bits: EmbeddingBits | None = None
    embedding_group_size: GroupSize = "auto"

    @override
    def problems(self, earlier: Sequence[Pass]) -> Iterator[Problem]:
        yield from super().problems(earlier)
        for other in earlier:
            if isinstance(other, ModelPass | Factorization):
                problem = (
                    f"finds no weights of its checkpoint behind '{other.name}', which puts other "
                    "linears in the place of those: take that pass away"
                )
                yield (), problem
            elif isinstance(other, Compression) and not other.stores_codes:
                yield (), f"would undo '{other.name}': keep one of the two"

    @override
    def outside(self, linear: Linear | Embedding) -> Self | None:
        if isinstance(linear, Linear):
            return self if self.embedding_bits is not None or linear.imported is not None else None
        return self if self.embedding_bits is not None and linear.of_tokens else None

    @override
    def call(self, group: LinearGroup) -> None:
        for options, linears in self.partition(group):
            for linear in linears:
                if linear.imported is not None:
                    self._take_over(linear)
                elif linear.block is None:
                    linear.quantize(options.requantize(linear.weight(), group.gram))
                else:
                    continue  # the checkpoint has it as the original does
                if group.gram is not None:
                    record_error(self.name, linear, group.gram)
        record_left_out(self.name, group)

    def _take_over(self, linear: Linear) -> None:
        assert linear.imported is not None  # noqa: S101 - the caller has checked
        imported = linear.imported()
        original = linear.weight()
        lost, size = (
            float(np.linalg.norm(values))
            for values in (original - imported.weight.dequantize(), original)
        )
        # Zeros in place of the weight would have this error: so has no approximation of it.
        if not lost < size and lost:
            raise PassError(
                linear.name,
                f"the compressed checkpoint differs by {lost / size if size else np.inf:.2g} times "
                "the original weight, so that it is not made from it: give the model that it was "
                "made from as 'model'",
            )
        linear.quantize(imported.weight)
        if imported.dequantized:
            linear.record.notes.append(f"{self.name}: kept in floats, for {imported.dequantized}.")

    @override
    def requantize(self, weight: NDArray[np.float32], gram: Gram | None) -> NBitsWeight:
        if self.embedding_bits is None:
            raise PassError(
                self.name,
                "'embedding_bits' says into what embeddings and head are rounded: give it a number "
                "where 'overrides' names them",
            )
        rounding = QuantizeRtn(bits=self.embedding_bits, group_size=self.embedding_group_size)
        return rounding.requantize(weight, gram)

    @override
    def code_bytes(self, out_features: int, in_features: int) -> int:
        raise PassError(self.name, "takes over weights whose size only their checkpoint knows")
