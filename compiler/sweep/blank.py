"""The graph that passes will leave, with zeros for weights: its size is known before any sweep."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import PassError
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.compression import Compression
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.graph.linears import find_again
from eoracc.passes.prune.pruning import Pruning
from eoracc.passes.quantize.embedding_tables import quantize_embedding_tables
from eoracc.passes.quantize.quantization import Quantization
from eoracc.passes.solvers.factorization import factorized_rank
from eoracc.plugins.operands.blank import blank_factors
from eoracc.plugins.operands.dense import DenseWeight

if TYPE_CHECKING:
    import onnx_ir as ir

    from eoracc.passes.base import Pass
    from eoracc.passes.graph.embeddings import Embedding
    from eoracc.passes.graph.linears import Linear
    from eoracc.passes.solvers.factor_types import FactorType
    from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["compress_blank"]


def compress_blank(
    passes: Sequence[Pass],
    model: ir.Model,
    linears: Sequence[Linear],
    embeddings: Iterable[Embedding],
) -> None:
    """Give a graph the weights that ``passes`` will leave in it, of zeros.

    Args:
      passes: those that factorise, quantize and compensate count.
      model: a copy of a graph that nothing else uses.
      linears: of ``model``, with their plans.
      embeddings: of ``model``, likewise.

    Raises:
      PassError: a pass compresses in a way whose size only its solution has.
    """
    for item in passes:
        for linear in linears:
            _apply(item, linear)
        if isinstance(item, Factorization):
            linears = find_again(model, linears)
        elif isinstance(item, Quantization):
            quantize_embedding_tables(item, embeddings, linears, _blank_table)


def _apply(item: Pass, linear: Linear) -> None:
    if isinstance(item, Factorization):
        _factorize(item, linear)
    elif isinstance(item, Quantization):
        options = item.options_for(linear)
        if options is not None:
            linear.quantize(options.blank(linear.out_features, linear.in_features))
    elif isinstance(item, Pruning):
        if item.options_for(linear) is not None:
            shape = linear.in_features, linear.out_features
            linear.quantize(DenseWeight(np.zeros(shape, np.float32).T))
    elif isinstance(item, Compression):
        raise PassError(item.name, "stores weights whose size is not known before it has run")
    elif isinstance(item, Compensation):
        wanted = item.options_for(linear)
        if wanted is not None and wanted.rank and linear.compressed is not None:
            rank = wanted.joined_rank(0 if linear.factors is None else linear.factors.rank)
            _compensate(linear, rank, wanted.factor_type)
    elif isinstance(item, QuantizeFactors):
        width = item.options_for(linear)
        if width is not None and linear.factors is not None:
            _compensate(linear, linear.factors.rank, width.factor_type)


def _factorize(item: Factorization, linear: Linear) -> None:
    options = item.options_for(linear)
    if options is None or options.ratio == 0:
        return
    rank = factorized_rank(linear.out_features, linear.in_features, options.ratio)
    linear.factorize(
        np.zeros((linear.out_features, rank), np.float32),
        np.zeros((rank, linear.in_features), np.float32),
    )


def _compensate(linear: Linear, rank: int, kind: FactorType) -> None:
    linear.compensate(blank_factors(linear.out_features, linear.in_features, rank, kind))


def _blank_table(options: Compression, embedding: Embedding) -> NBitsWeight:
    assert isinstance(options, Quantization)  # noqa: S101 - the only caller has checked
    return options.blank(*embedding.shape)
