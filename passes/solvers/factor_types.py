"""Low-rank factors in the types that they are stored in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.solvers.factors import to_float16
from eoracc.passes.solvers.gptq import round_rows
from eoracc.plugins.operands.codes import LARGEST, tile_bytes
from eoracc.plugins.operands.low_rank import LowRank

if TYPE_CHECKING:
    from eoracc.passes.solvers.gram import Gram

__all__ = ["FactorType", "factor_bytes", "fit_scales", "round_to_nearest", "store_factors"]

FactorType = Literal["float16", "int8", "int4"]
"""Of both factors; integer ones have a scale a row, see :func:`fit_scales`."""

_SHRINKS = np.linspace(1.0, 0.4, 13)
"""Factors by which the search for a scale narrows a row's range."""

_HALF_TOLERANCE = 2.0**-8
"""By how much, relative to it, a scale may be rounded to float16. Codes are rounded afterwards, and
the largest of 127 steps still moves by less than half a step."""

Float = NDArray[np.float64]


def store_factors(
    b: Float,
    a: Float,
    factor_type: FactorType,
    *,
    gram: Gram | None = None,
    weighted: NDArray[np.floating] | None = None,
) -> LowRank:
    """Factors as the artifact holds them.

    For int8, columns of ``b`` are first brought to one norm, and the rows of ``a`` take up the
    difference in their scales: a row of ``b`` has one step for all ranks, in which the smaller ones
    would be lost.

    Four bits take more care. Rows of ``a`` are rounded with error feedback (:mod:`.gptq`), so that
    what they give of the calibration tokens changes least; ``b`` is then solved for again against
    the rounded ``a``, which is a least-squares problem in the same metric, and rounded last.

    Args:
      b: ``[N, R]``.
      a: ``[R, K]``.
      factor_type: what to store.
      gram: of the linear's input, whose tokens errors are weighed by; None weighs all inputs alike.
      weighted: what ``b @ a`` stands for, ``[N, K]``: with a Gram ``delta @ gram.root``, without
        one ``delta``. None takes ``b @ a`` for the whole of it.
    """
    if factor_type == "float16":
        return LowRank(lora_a=to_float16(a), lora_b=to_float16(b))
    bits = 8 if factor_type == "int8" else 4
    if bits == 4 and a.size:
        lora_a, a_scale = _round_a(a, gram)
        b = _solve_b(b, a, lora_a * a_scale[:, None], gram, weighted)
        b, stretch = _unit_columns(b)
        exact = a_scale * stretch
        a_scale = _storable(exact)
        # What rounding changes of a row of A, its column of B takes back.
        b = b * np.divide(exact, a_scale, out=np.ones_like(exact), where=a_scale > 0)
    else:
        b, stretch = _unit_columns(b)
        a = a * stretch[:, None]
        a_scale = fit_scales(a, bits=bits)
        lora_a = round_to_nearest(a, a_scale, bits=bits)
    b_scale = fit_scales(b, bits=bits, search=bits == 4)
    return LowRank(
        lora_a=lora_a,
        lora_b=round_to_nearest(b, b_scale, bits=bits),
        lora_a_scale=a_scale.astype(np.float32),
        lora_b_scale=b_scale.astype(np.float32),
        bits=bits,
    )


def factor_bytes(out_features: int, in_features: int, rank: int, factor_type: FactorType) -> int:
    """Bytes that factors will take in tiles, :attr:`.LowRank.nbytes`; none of rank 0.

    >>> factor_bytes(48, 64, 16, "int4"), factor_bytes(48, 64, 4, "int4")
    (1024, 832)
    """
    if not rank:
        return 0
    bits = {"float16": 16, "int8": 8, "int4": 4}[factor_type]
    stored = tile_bytes(rank, in_features, bits=bits) + tile_bytes(out_features, rank, bits=bits)
    if factor_type != "float16":
        stored += tile_bytes(rank, 1, bits=16) + tile_bytes(out_features, 1, bits=16)
    return stored


def fit_scales(
    factor: Float,
    *,
    bits: int,
    search: bool = False,
    importance: NDArray[np.floating] | None = None,
) -> Float:
    """What a step of each row's codes is worth; 0 where the row is nothing but zeros.

    Args:
      factor: ``[rows, columns]``.
      bits: 8 or 4.
      search: narrow a row's range where that lowers its squared error; otherwise its largest value
        takes the largest code.
      importance: of each column's squared error, ``[columns]``; None weighs all alike.

    Returns:
      ``[rows]``, values that float16 holds; those too small or large for it are float32's.

    >>> fit_scales(np.array([[2.0, -4.0, 0.1], [0.0, 0.0, 0.0]]), bits=4).round(4).tolist()
    [0.5713, 0.0]
    """
    weights = np.ones(factor.shape[1]) if importance is None else np.asarray(importance)
    widest = np.abs(factor).max(axis=1, initial=0.0) / LARGEST[bits]
    scale, least = _storable(widest), np.full(len(factor), np.inf)
    for shrink in _SHRINKS if search else ():
        candidate = _storable(widest * shrink)
        rounded = round_to_nearest(factor, candidate, bits=bits) * candidate[:, None]
        error = (rounded - factor) ** 2 @ weights
        better = error < least
        scale[better], least[better] = candidate[better], error[better]
    return scale


def round_to_nearest(factor: Float, scale: Float, *, bits: int) -> NDArray[np.int8]:
    """Codes of each row, off by half a step at most where the range of ``bits`` reaches.

    >>> factor = np.array([[2.0, -4.0, 0.1]])
    >>> round_to_nearest(factor, fit_scales(factor, bits=8), bits=8).tolist()
    [[64, -127, 3]]
    """
    steps = np.where(scale > 0, scale, np.inf)[:, None]
    codes: NDArray[np.int8] = np.clip(
        np.rint(factor / steps), -LARGEST[bits], LARGEST[bits]
    ).astype(np.int8)
    return codes


def _storable(scale: Float) -> Float:
    """As float16 holds it, which an artifact then stores, or as float32 does where that is too far.

    One that float32 rounds to 0 or to a denormal leaves nothing of its row.
    """
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16).astype(np.float64)
    is_near = np.abs(half - scale) <= _HALF_TOLERANCE * scale
    stored = np.where(is_near, half, scale.astype(np.float32).astype(np.float64))
    return np.where(stored >= np.finfo(np.float32).tiny, stored, 0.0)


def _unit_columns(b: Float) -> tuple[Float, Float]:
    """``b`` with columns of norm 1, and the norms that they had; a column of zeros stays so."""
    norms = np.linalg.norm(b, axis=0)
    norms = np.where(norms > 0, norms, 1.0)
    return b / norms, norms


def _round_a(a: Float, gram: Gram | None) -> tuple[NDArray[np.int8], Float]:
    """4-bit codes of ``a`` and their scales."""
    if gram is None:
        scale = fit_scales(a, bits=4, search=True)
        return round_to_nearest(a, scale, bits=4), scale
    scale = fit_scales(a, bits=4, search=True, importance=np.diagonal(gram.matrix))
    codes = round_rows(a.astype(np.float32), gram.feedback(), scale, largest=LARGEST[4])
    return codes, scale


def _solve_b(
    b: Float,
    a: Float,
    rounded: Float,
    gram: Gram | None,
    weighted: NDArray[np.floating] | None,
) -> Float:
    """``B`` that with the ``rounded`` A comes nearest to ``weighted``, or to ``b @ a``."""
    if gram is not None:
        a, rounded = (_projected(factor, gram) for factor in (a, rounded))
    target = np.asarray(b @ a if weighted is None else weighted, np.float64)
    solved: Float = np.asarray(np.linalg.lstsq(rounded.T, target.T, rcond=None)[0].T, np.float64)
    return solved


def _projected(a: Float, gram: Gram) -> Float:
    """``a @ gram.root``; against the root, products in float32 will do."""
    projected: Float = np.asarray(a.astype(np.float32) @ gram.root, np.float64)
    return projected
