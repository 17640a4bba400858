"""The graph that passes will leave, with zeros for weights: its size is known before any sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.quantize.embedding_tables import quantize_embedding_tables
from eoracc.passes.quantize.quantization import Quantization
from eoracc.plugins.operands.blank import blank_factors

if TYPE_CHECKING:
    from eoracc.passes.base import Pass
    from eoracc.passes.compression import Compression
    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["compress_blank"]


def compress_blank(
    passes: Sequence[Pass], linears: Sequence[Linear], embeddings: Iterable[Embedding]
) -> None:
    """Give the linears and tables of a graph the operands that ``passes`` will store, of zeros.

    Args:
      passes: those that quantize and compensate count.
      linears: of a copy of the graph that nothing else uses, with their plans.
      embeddings: of the same copy, likewise.
    """
    for item in passes:
        for linear in linears:
            _apply(item, linear)
        if isinstance(item, Quantization):
            quantize_embedding_tables(item, embeddings, linears, _blank_table)


def _apply(item: Pass, linear: Linear) -> None:
    shape = linear.out_features, linear.in_features
    if isinstance(item, Quantization):
        options = item.options_for(linear)
        if options is not None:
            linear.quantize(options.blank(*shape))
    elif isinstance(item, Compensation):
        wanted = item.options_for(linear)
        if wanted is not None and wanted.rank and linear.compressed is not None:
            rank = wanted.rank + (0 if linear.factors is None else linear.factors.rank)
            linear.compensate(blank_factors(*shape, rank, wanted.factor_type))
    elif isinstance(item, QuantizeFactors):
        width = item.options_for(linear)
        if width is not None and linear.factors is not None:
            rank = linear.factors.rank
            linear.compensate(blank_factors(*shape, rank, "int8" if width.bits == 8 else "int4"))


def _blank_table(options: Compression, embedding: Embedding) -> NBitsWeight:
    assert isinstance(options, Quantization)  # noqa: S101 - the only caller has checked
    rows, width = embedding.source.shape.numpy()
    return options.blank(rows, width)
