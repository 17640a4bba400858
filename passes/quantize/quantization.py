"""Base of the passes that store weights as codes of a few bits with a scale per group."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from pydantic import BeforeValidator
from typing_extensions import override

from eoracc.passes.compression import Compression
from eoracc.passes.graph.embeddings import Embedding
from eoracc.passes.overrides import Override
from eoracc.passes.quantize.float16_range import range_shift, shift_scales, shifted
from eoracc.passes.quantize.row_blocks import by_row_blocks
from eoracc.passes.solvers.grid import group_width, round_to_nearest
from eoracc.plugins.operands.blank import blank_weight
from eoracc.plugins.operands.weight import weight_bytes
from eoracc.printable import quoted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.compression import Compressor
    from eoracc.passes.graph.linears import Linear, LinearGroup, Pruner
    from eoracc.passes.solvers.gram import Gram
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = [
    "EMBEDDING_BITS",
    "Bits",
    "EmbeddingBits",
    "GroupSize",
    "Quantization",
    "QuantizeOverride",
]

_SCALE_BYTES = 2
"""Of a group of codes: float16, but for weights beyond its range, where it is float32."""

Bits = Literal[2, 3, 4, 6, 8]
"""Width of a code."""

EmbeddingBits = Literal[3, 4, 6, 8]
"""Width of a code of an embedding table or of the head."""

EMBEDDING_BITS: EmbeddingBits = 6
"""The default of them. Every token passes through table and head, so that their errors cost more
than those of a linear of a block (docs/results/embeddings.md)."""


def _check_group_size(size: object) -> object:
    if size in ("auto", -1):
        return size
    if type(size) is not int or size % 8 or not 16 <= size <= 256:
        raise ValueError(
            f"{quoted(size)} is no group size: give a multiple of 8 in 16..256, -1 for whole rows, "
            "or 'auto'"
        )
    return size


# Checked before the union, which would report each of its members.
GroupSize = Annotated[int | Literal["auto"], BeforeValidator(_check_group_size)]
"""Columns that share a scale; -1 stands for the whole row, ``auto`` for a width that divides it."""


@dataclass(frozen=True, kw_only=True)
class QuantizeOverride(Override):
    """Options of a quantizing pass that may differ by linear."""

    bits: Bits | None = None
    group_size: GroupSize | None = None
    symmetric: bool | None = None
    clip_search: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Quantization(Compression):
    """Base of the passes that quantize weights.

    Options:
      bits: width of a code.
      group_size: columns that share a scale. ``auto`` takes the largest multiple of 32 from 96
        to 192 that divides the row, or else cuts it into almost equal ones; a number is a multiple
        of 8 in 16..256; -1 stands for whole rows. The last group of a row may be shorter.
      symmetric: store no zero points.
      clip_search: search for the range of each group with the least error, not just its extremes.
      embedding_bits: width of the token embeddings and of linears outside the decoder blocks, such
        as the head; null leaves both as they are. A head that is tied to the embeddings shares
        their codes.
      embedding_group_size: columns of them that share a scale, as ``group_size``.
    """

    bits: Bits = 4
    group_size: GroupSize = "auto"
    symmetric: bool = False
    clip_search: bool = True
    embedding_bits: EmbeddingBits | None = EMBEDDING_BITS
    embedding_group_size: GroupSize = "auto"
    overrides: Mapping[str, QuantizeOverride] = field(default_factory=dict)

    @abstractmethod
    def solve(self, weight: NDArray[np.float32], gram: Gram | None) -> NBitsWeight:
        """Quantize a weight ``[N, K]`` that is in the range of float16 scales.

        Args:
          weight: to be approximated.
          gram: of the input, where statistics were taken.
        """

    def solve_pruned(
        self, weight: NDArray[np.float32], gram: Gram | None, pruner: Pruner
    ) -> NBitsWeight:
        """Quantize and prune a weight ``[N, K]`` that is in the range of float16 scales.

        A pass whose :meth:`solve` does not leave every zero a zero overrides this.

        Args:
          weight: to be approximated.
          gram: of the input, where statistics were taken.
          pruner: has chosen what is removed, or says how much of it.
        """
        return self.solve(pruner.prune(weight, gram), gram)

    @override
    def solvers(self, linears: Sequence[Linear]) -> Iterator[tuple[Compressor, Sequence[Linear]]]:
        parts: list[tuple[Pruner | None, list[Linear]]] = []
        for linear in linears:
            known = (members for pruner, members in parts if pruner == linear.pruner)
            members = next(known, None)
            if members is None:
                parts.append((linear.pruner, members := []))
            members.append(linear)
        for pruner, members in parts:
            yield (self if pruner is None else _Joint(self, pruner)), members

    @override
    def outside(self, linear: Linear | Embedding) -> Self | None:
        if self.embedding_bits is None:
            return None
        if isinstance(linear, Embedding) and not linear.of_tokens:
            return None
        return replace(self, bits=self.embedding_bits, group_size=self.embedding_group_size)

    @override
    def requantize(self, weight: NDArray[np.float32], gram: Gram | None) -> NBitsWeight:
        shift = range_shift(weight, bits=self.bits)
        return shift_scales(self.solve(shifted(weight, shift), gram), -shift)

    @override
    def call(self, group: LinearGroup) -> None:
        super().call(group)
        for linear in group.linears:
            if linear.quantized is not None and linear.quantized.scales.dtype == np.float32:
                linear.record.notes.append(
                    f"{self.name}: scales are float32, for its weights, "
                    f"{np.abs(linear.weight()).max():.2g} at most, are beyond float16 scales."
                )

    @override
    def code_bytes(self, out_features: int, in_features: int) -> int:
        width = group_width(self.group_size, in_features)
        return weight_bytes(
            out_features,
            in_features,
            bits=self.bits,
            groups=-(-in_features // width),
            scale_bytes=_SCALE_BYTES,
            zero_points=not self.symmetric,
        )

    def blank(self, out_features: int, in_features: int) -> NBitsWeight:
        """A weight ``[N, K]`` of zeros, stored as these options store weights in float16's range.

        Args:
          out_features: ``N``.
          in_features: ``K``.
        """
        return blank_weight(
            out_features,
            in_features,
            bits=self.bits,
            group_size=group_width(self.group_size, in_features),
            zero_points=not self.symmetric,
        )

    def round_to_nearest(
        self, weight: NDArray[np.float32], *, importance: NDArray[np.floating] | None = None
    ) -> NBitsWeight:
        """Round a weight ``[N, K]`` to the nearest codes.

        Args:
          weight: to be rounded.
          importance: of each column to the search for a range, ``[K]``; None weighs all alike.
        """
        return by_row_blocks(
            weight,
            partial(
                round_to_nearest,
                bits=self.bits,
                group_size=group_width(self.group_size, weight.shape[1]),
                symmetric=self.symmetric,
                importance=importance,
                clip_search=self.clip_search,
            ),
        )


@dataclass(frozen=True)
class _Joint:
    """A quantizing pass that solves for codes and zeros together with a pruning pass.

    Attributes:
      quantization: with the options for the linears that it serves.
      pruner: likewise.
    """

    quantization: Quantization
    pruner: Pruner

    def requantize(self, weight: NDArray[np.float32], gram: Gram | None) -> NBitsWeight:
        shift = range_shift(weight, bits=self.quantization.bits)
        solved = self.quantization.solve_pruned(shifted(weight, shift), gram, self.pruner)
        return shift_scales(solved, -shift)

    def compress(
        self, weights: Iterable[NDArray[np.float32]], gram: Gram | None
    ) -> Iterator[NBitsWeight]:
        return (self.requantize(weight, gram) for weight in weights)
