"""Bytes of linears: planned ones, computed from shapes before the passes run, and stored ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from eoracc.passes.base import Pass
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.compression import Compression
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.graph.linears import Linear
from eoracc.passes.recipe import Recipe
from eoracc.passes.solvers.factor_types import FactorType, factor_bytes
from eoracc.passes.solvers.factorization import factorized_rank

__all__ = ["PLAIN_BYTES", "planned_bytes", "rank_limit", "stored_bytes", "with_rank"]

PLAIN_BYTES = 2
"""Bytes of a value that is not quantized: 16 bits, as in published tables. The graph itself holds
float32."""


@dataclass
class _Part:
    """A linear, or one of the two that a factorisation makes of it.

    Attributes:
      linear: in the state before the next pass.
      weight_bytes: of its codes, scales and zero points; None while it is not compressed.
      rank: of its factors.
      factor_type: of all of them: a compensation stores earlier ones anew with its own.
    """

    linear: Linear
    weight_bytes: int | None = None
    rank: int = 0
    factor_type: FactorType = "float16"

    @property
    def nbytes(self) -> int:
        shape = self.linear.out_features, self.linear.in_features
        weight = PLAIN_BYTES * shape[0] * shape[1] if self.weight_bytes is None else 0
        return weight + (self.weight_bytes or 0) + factor_bytes(*shape, self.rank, self.factor_type)


def planned_bytes(passes: Sequence[Pass], linears: Iterable[Linear]) -> int:
    """Bytes of ``linears`` after ``passes``, without the decisions of surveys.

    Codes, scales, zero points, low-rank factors and padding count with their stored bytes, values
    that are not quantized with 16 bits.

    Args:
      passes: in the order of model.yaml.
      linears: of the graph, not compressed yet.
    """
    return sum(part.nbytes for part in _parts(passes, linears))


def with_rank(passes: Sequence[Pass], rank: int) -> tuple[Pass, ...]:
    """``passes``, the last compensation with ``rank``; those before it keep theirs."""
    last = Recipe(passes).compensations[-1]
    return tuple(replace(last, rank=rank) if item is last else item for item in passes)


def rank_limit(passes: Sequence[Pass], linears: Iterable[Linear]) -> int:
    """The largest rank that the last compensation can give to all linears; 0 for none.

    A linear whose rank comes from an override sets no limit.
    """
    linears = list(linears)
    # A rank that no linear can have: a linear that gets it has no override.
    asked = 1 + max((max(linear.out_features, linear.in_features) for linear in linears), default=0)
    limits = [
        min(part.linear.out_features, part.linear.in_features) - (part.rank - asked)
        for part in _parts(with_rank(passes, asked), linears)
        if part.rank >= asked
    ]
    return max(0, min(limits, default=0))


def stored_bytes(linears: Iterable[Linear]) -> int:
    """Stored bytes of ``linears``, counted as in :func:`planned_bytes`."""
    total = 0
    for linear in linears:
        weight, factors = linear.quantized, linear.factors
        plain = PLAIN_BYTES * linear.out_features * linear.in_features
        total += plain if weight is None else weight.nbytes
        total += 0 if factors is None else factors.nbytes
    return total


def _parts(passes: Sequence[Pass], linears: Iterable[Linear]) -> list[_Part]:
    parts = [_Part(linear) for linear in linears]
    for item in passes:
        if isinstance(item, Factorization):
            parts = [factor for part in parts for factor in _factorized(item, part)]
        elif isinstance(item, Compression):
            for part in parts:
                part.weight_bytes = _compressed(item, part)
        elif isinstance(item, Compensation):
            for part in parts:
                options = item.options_for(part.linear)
                if options is not None and options.rank and part.weight_bytes is not None:
                    part.rank = options.joined_rank(part.rank)
                    part.factor_type = options.factor_type
        elif isinstance(item, QuantizeFactors):
            for part in parts:
                width = item.options_for(part.linear)
                if width is not None:
                    part.factor_type = width.factor_type
    return parts


def _factorized(item: Factorization, part: _Part) -> list[_Part]:
    linear, options = part.linear, item.options_for(part.linear)
    if options is None or options.ratio == 0:
        return [part]
    rank = factorized_rank(linear.out_features, linear.in_features, options.ratio)
    # Equal to the two linears that the factorised graph will have; no graph is changed.
    first = replace(linear, name=f"{linear.name}.v", out_features=rank, whole=linear, plan={})
    second = replace(linear, name=f"{linear.name}.u", in_features=rank, whole=linear, plan={})
    return [_Part(first), _Part(second)]


def _compressed(item: Compression, part: _Part) -> int | None:
    options = item.options_for(part.linear)
    if options is None:
        return part.weight_bytes
    if not options.stores_codes:
        return PLAIN_BYTES * part.linear.out_features * part.linear.in_features
    return options.code_bytes(part.linear.out_features, part.linear.in_features)
