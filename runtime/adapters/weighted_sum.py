"""A weighted sum of low-rank factors, as factors whose ranks are those of all terms together.

Weights go into ``lora_a_scale``, so that factors of float types are summed exactly, and so is
``lora_a`` of integer ones. The rows of an integer ``lora_b`` have one scale each, which all terms
must share: codes of the term with the largest steps stay as they are, those of the others are
rounded to the same steps. Terms are scaled against each other before, so that a step of one is
worth as much as a step of another: what is rounded is off by no more than the rounding of the
coarsest term has been.
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

_WIDENED = LARGEST[8] // LARGEST[4]
"""A 4-bit value is that many times itself in 8 bits, in steps that are finer by as much."""


def weighted_sum(terms: Sequence[tuple[LowRank, float]]) -> LowRank:
    """Factors with ``product() = sum(weight * factors.product())``.

    Args:
      terms: factors of one linear, of any ranks, with finite weights; all of them float factors of
        one type or all integer ones. One with weight 0 adds nothing, not even its ranks.

    Returns:
      Factors of the type of the terms. Several integer ones become int8, ``lora_b`` rounded: an
      element of term ``t`` in row ``n`` is off by half of ``max_u(s_u[n] c_u) / c_t`` at most, with
      the scales ``s`` of its rows and ``c = |weight| ||lora_a||_F``.

    Raises:
      PluginError: the terms are of several types, or there are none.
    """
    kinds = {(one.lora_a.dtype, one.lora_b.dtype) for one, _ in terms}
    if len(kinds) != 1:
        names = " and ".join(sorted({one.factor_type for one, _ in terms})) or "none"
        raise PluginError(f"factors that are summed have one type, not {names}")
    used = [(one, weight) for one, weight in terms if weight and one.rank]
    if not used:
        first = terms[0][0]
        return _take_ranks(first, 0)
    if len(used) == 1:
        ((one, weight),) = used
        return one if weight == 1 else _weighted(one, weight)
    if used[0][0].lora_a.dtype != np.int8:
        return _sum_floats([_weighted(one, weight) for one, weight in used])
    return _sum_integers(used)


def _weighted(one: LowRank, weight: float) -> LowRank:
    return _replace_scale(one, _scale(one) * weight)


def _scale(one: LowRank) -> NDArray[np.float64]:
    if one.lora_a_scale is None:
        return np.ones(one.rank)
    return one.lora_a_scale.astype(np.float64)


def _replace_scale(one: LowRank, scale: NDArray[np.float64]) -> LowRank:
    return LowRank(
        lora_a=one.lora_a,
        lora_b=one.lora_b,
        lora_a_scale=scale.astype(np.float32),
        lora_b_scale=one.lora_b_scale,
        bits=one.bits,
    )


def _take_ranks(one: LowRank, rank: int) -> LowRank:
    return LowRank(
        lora_a=one.lora_a[:rank],
        lora_b=one.lora_b[:, :rank],
        lora_a_scale=None if one.lora_a_scale is None else one.lora_a_scale[:rank],
        lora_b_scale=one.lora_b_scale,
        bits=one.bits,
    )


def _sum_floats(terms: Sequence[LowRank]) -> LowRank:
    return LowRank(
        lora_a=np.concatenate([one.lora_a for one in terms]),
        lora_b=np.concatenate([one.lora_b for one in terms], axis=1),
        lora_a_scale=np.concatenate([_scale(one) for one in terms]).astype(np.float32),
    )


def _sum_integers(terms: Sequence[tuple[LowRank, float]]) -> LowRank:
    # [terms] and [terms, N]: what a term's step of lora_b is worth in the output, of each row.
    sizes = np.array([abs(weight) * np.linalg.norm(one.down()) for one, weight in terms])
    sizes = np.where(sizes > 0, sizes, 1.0)
    wide = [_widen(one) for one, _ in terms]
    steps = np.stack([scale * size for (_, scale), size in zip(wide, sizes, strict=True)])
    common = steps.max(axis=0)
    divisors = np.where(common > 0, common, 1.0)
    lora_b = [
        np.rint(codes * (step / divisors)[:, None]).astype(np.int8)
        for (codes, _), step in zip(wide, steps, strict=True)
    ]
    # The balance takes a factor out of lora_b that lora_a gets back.
    scales = [_scale(one) * weight / size for (one, weight), size in zip(terms, sizes, strict=True)]
    balance = 1 / sizes.max()
    return LowRank(
        lora_a=np.concatenate([one.lora_a for one, _ in terms]),
        lora_b=np.concatenate(lora_b, axis=1),
        lora_a_scale=(np.concatenate(scales) / balance).astype(np.float32),
        lora_b_scale=(common * balance).astype(np.float32),
    )


def _widen(one: LowRank) -> _Codes:
    """``lora_b`` in 8 bits with its scales; as the values need not fill 8 bits, nothing is lost."""
    assert one.lora_b_scale is not None  # noqa: S101 - integer factors have it
    factor = _WIDENED if one.bits == 4 else 1
    return (one.lora_b * np.int8(factor)).astype(np.int8), one.lora_b_scale / np.float64(factor)
