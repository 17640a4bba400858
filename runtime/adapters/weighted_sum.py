"""A weighted sum of low-rank factors: factors with the ranks of all terms side by side.

Weights go into ``lora_a_scale``. So float factors are summed exactly, as is ``lora_a`` of integer
ones. Each row of an integer ``lora_b`` has one scale, which all terms must share: the codes of the
term with the largest step are kept, and the codes of the others are rounded to that step. Terms are
first scaled against each other so that a step of ``lora_b`` changes the output equally in all of
them; then rounding adds no more error than the coarsest term already has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from eoracc.errors import PluginError
from eoracc.plugins.operands.codes import LARGEST
from eoracc.plugins.operands.low_rank import LowRank

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["weighted_sum"]

_Codes: TypeAlias = tuple[NDArray[np.int8], NDArray[np.float64]]

_BEYOND = "a weight takes the factors beyond the range of float32: choose a smaller weight"

_WIDENED = LARGEST[8] // LARGEST[4]
"""Factor of the codes when 4-bit values become 8-bit ones, with steps smaller by as much."""


def weighted_sum(terms: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Factors with ``product() = sum(weight * factors.product())``.

    Args:
      terms: factors of one linear, of any ranks, with finite weights; either all of one float type
        or all integer. A term of weight 0 adds nothing, not even ranks.

    Returns:
      Factors of the type of the terms. Several integer terms become int8 with ``lora_b`` rounded:
      the error of an element of term ``t`` in row ``n`` is half of ``max_u(s_u[n] c_u) / c_t`` at
      most, with the scales ``s`` of its rows and ``c = |weight| ||lora_a||_F``.

    Raises:
      PluginError: the terms are of several types, there are none, or a weight takes a term beyond
        the range of float32.
    """
    kinds = {(factors.lora_a.dtype, factors.lora_b.dtype) for factors, _ in terms}
    if len(kinds) != 1:
        names = " and ".join(sorted({factors.factor_type for factors, _ in terms})) or "none"
        raise PluginError(f"factors that are summed have one type, not {names}")
    used = [(factors, weight) for factors, weight in terms if weight and factors.rank]
    if not used:
        first = terms[0][0]
        return _take_ranks(first, 0)
    if len(used) == 1:
        ((factors, weight),) = used
        return factors if weight == 1 else _weighted(factors, weight)
    if used[0][0].lora_a.dtype != np.int8:
        return _sum_floats([_weighted(factors, weight) for factors, weight in used])
    return _sum_integers(used)


def _weighted(factors: LowRank, weight: float) -> LowRank:
    return _replace_scale(factors, _scale(factors) * weight)


def _scale(factors: LowRank) -> NDArray[np.float64]:
    if factors.lora_a_scale is None:
        return np.ones(factors.rank)
    return factors.lora_a_scale.astype(np.float64)


def _replace_scale(factors: LowRank, scale: NDArray[np.float64]) -> LowRank:
    return LowRank(
        lora_a=factors.lora_a,
        lora_b=factors.lora_b,
        lora_a_scale=_to_float32(scale),
        lora_b_scale=factors.lora_b_scale,
        bits=factors.bits,
    )


def _to_float32(values: NDArray[np.float64]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        converted = values.astype(np.float32)
    if not np.isfinite(converted).all():
        raise PluginError(_BEYOND)
    return converted


def _take_ranks(factors: LowRank, rank: int) -> LowRank:
    return LowRank(
        lora_a=factors.lora_a[:rank],
        lora_b=factors.lora_b[:, :rank],
        lora_a_scale=None if factors.lora_a_scale is None else factors.lora_a_scale[:rank],
        lora_b_scale=factors.lora_b_scale,
        bits=factors.bits,
    )


def _sum_floats(terms: Sequence[LowRank]) -> LowRank:
    return LowRank(
        lora_a=np.concatenate([factors.lora_a for factors in terms]),
        lora_b=np.concatenate([factors.lora_b for factors in terms], axis=1),
        lora_a_scale=_to_float32(np.concatenate([_scale(factors) for factors in terms])),
    )


def _sum_integers(terms: Sequence[tuple[LowRank, float]]) -> LowRank:
    # [terms] and [terms, N]: effect of one step of a term's lora_b on each row of the output.
    sizes = np.array([abs(weight) * _norm(factors) for factors, weight in terms])
    if not np.isfinite(sizes).all():
        raise PluginError(_BEYOND)
    sizes = np.where(sizes > 0, sizes, 1.0)
    wide = [_widen(factors) for factors, _ in terms]
    steps = np.stack([scale * size for (_, scale), size in zip(wide, sizes, strict=True)])
    common = steps.max(axis=0)
    divisors = np.where(common > 0, common, 1.0)
    lora_b = [
        np.rint(codes * (step / divisors)[:, None]).astype(np.int8)
        for (codes, _), step in zip(wide, steps, strict=True)
    ]
    # The balance moves a factor from lora_b to lora_a.
    scales = [
        _scale(factors) * weight / size
        for (factors, weight), size in zip(terms, sizes, strict=True)
    ]
    balance = 1 / sizes.max()
    return LowRank(
        lora_a=np.concatenate([factors.lora_a for factors, _ in terms]),
        lora_b=np.concatenate(lora_b, axis=1),
        lora_a_scale=_to_float32(np.concatenate(scales) / balance),
        lora_b_scale=_to_float32(common * balance),
    )


def _norm(factors: LowRank) -> float:
    """Frobenius norm of ``lora_a``; in float64, as scales may be near the end of float32."""
    with np.errstate(over="ignore"):
        return float(np.linalg.norm(factors.lora_a * _scale(factors)[:, None]))


def _widen(factors: LowRank) -> _Codes:
    """Codes of ``lora_b`` in 8 bits, exactly, with their scales."""
    assert factors.lora_b_scale is not None  # noqa: S101 - integer factors have it
    factor = _WIDENED if factors.bits == 4 else 1
    codes = (factors.lora_b * np.int8(factor)).astype(np.int8)
    return codes, factors.lora_b_scale / np.float64(factor)
