"""The quantization grid: the values that the codes of a group can take.

A grid gives every group of a row a scale and a zero point, ``value = (code - zero_point) * scale``.
Scales are rounded to float16 *before* anything is scored or quantized, so that the measured error
is the error of the stored weight.

The unit of work is a slab ``[width, N]``: one group of all rows, transposed, so that every NumPy
operation runs along contiguous rows. GPTQ calls :func:`fit_slab` on slabs of weights that it has
just updated; :func:`find_grid` calls it on the slabs of a whole weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.weight import NBitsWeight

__all__ = [
    "Grid",
    "find_grid",
    "fit_slab",
    "group_width",
    "groups",
    "quantize",
    "round_to_nearest",
    "to_nbits",
]

_LARGEST_AUTO = 192
"""Largest width that ``auto`` takes. Against 64 it stores 0.21 bits less of every weight, for which
the squared error grows by 1.2 in 3 bits: less than if the codes lost 0.21 bits, 1.34."""
_LEAST_AUTO = 96
"""A row that no width from here on divides costs less with a short last group."""
_BLOCK = 32
"""Columns of a block of int8 activations."""

_SHRINKS = (1.0, 0.85, 0.7)
"""Factors by which the clipping search narrows a group's range."""
_REFITS = 2
"""Least-squares refinements of a group's scale after the search."""

_MIN_SCALE = float(np.finfo(np.float16).smallest_subnormal)
_MAX_SCALE = float(np.finfo(np.float16).max)

Float = NDArray[np.float32]


@dataclass(frozen=True, eq=False, kw_only=True)
class Grid:
    """Scales and zero points of a weight ``[N, K]``.

    Attributes:
      scales: ``float16 [N, G]`` with ``G = ceil(K / group_size)``, all positive.
      zero_points: ``uint8 [N, G]``, or None where every zero point is ``2**(bits - 1)``.
      bits: width of a code.
      group_size: columns that share a scale, a multiple of 8.
    """

    scales: NDArray[np.float16]
    zero_points: NDArray[np.uint8] | None
    bits: int
    group_size: int


def group_width(group_size: int | Literal["auto"], in_features: int) -> int:
    """Columns per group of a row of ``in_features`` columns.

    Args:
      group_size: the width itself; -1 for the whole row rounded up to a multiple of 8; or ``auto``
        for the largest multiple of 32 (a block of int8 activations) from 96 to 192 that divides
        the row. Where none does, the row has the fewest groups of at most 192, as equal as
        multiples of 32 can be, the last one shorter. A row of at most 192 columns is one group.
      in_features: ``K``.

    >>> group_width(-1, 20), group_width(64, 20)
    (24, 64)
    >>> [group_width("auto", columns) for columns in (576, 640, 1536, 4096, 48, 20, 634)]
    [192, 160, 192, 128, 48, 24, 160]
    >>> [group_width("auto", columns) for columns in (608, 1000, 1184)]
    [160, 192, 192]
    """
    if group_size == "auto":
        return _automatic_width(in_features)
    return _rounded_up(in_features) if group_size == -1 else group_size


def _automatic_width(in_features: int) -> int:
    if in_features <= _LARGEST_AUTO:
        return _rounded_up(in_features)
    for width in range(_LARGEST_AUTO, _LEAST_AUTO - 1, -_BLOCK):
        if in_features % width == 0:
            return width
    fewest = -(-in_features // _LARGEST_AUTO)
    return _rounded_up(-(-in_features // fewest), _BLOCK)


def _rounded_up(columns: int, unit: int = 8) -> int:
    return -(-columns // unit) * unit


def groups(in_features: int, width: int) -> Iterator[slice]:
    """Column ranges of the groups of a row; the last one may be shorter.

    >>> list(groups(20, 16))
    [slice(0, 16, None), slice(16, 20, None)]
    """
    for start in range(0, in_features, width):
        yield slice(start, min(start + width, in_features))


def find_grid(
    weight: Float,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    importance: NDArray[np.floating] | None = None,
    clip_search: bool = True,
) -> Grid:
    """Choose scales and zero points for every group of ``weight``.

    Args:
      weight: ``float32 [N, K]``.
      bits: 2, 3, 4, 6 or 8.
      group_size: a multiple of 8, or -1 for whole rows.
      symmetric: fix the zero point at ``2**(bits - 1)``.
      importance: weight of each column's squared error, ``[K]``, nonnegative, for example the
        diagonal of the Gram. None weighs all columns equally.
      clip_search: look for a range narrower than the group's minimum and maximum where that
        lowers the weighted squared error.
    """
    rows, columns = weight.shape
    width = group_width(group_size, columns)
    slabs = list(groups(columns, width))
    scales = np.empty((rows, len(slabs)), np.float16)
    zero_points = np.empty((rows, len(slabs)), np.uint8)
    for index, slab in enumerate(slabs):
        scales[:, index], zero_points[:, index] = fit_slab(
            np.ascontiguousarray(weight[:, slab].T),
            bits=bits,
            symmetric=symmetric,
            importance=None if importance is None else importance[slab],
            clip_search=clip_search,
        )
    return Grid(
        scales=scales,
        zero_points=None if symmetric else zero_points,
        bits=bits,
        group_size=width,
    )


def fit_slab(
    values: Float,
    *,
    bits: int,
    symmetric: bool,
    importance: NDArray[np.floating] | None,
    clip_search: bool,
) -> tuple[NDArray[np.float16], NDArray[np.uint8]]:
    """Scale and zero point of each column of a slab.

    Args:
      values: ``float32 [width, N]``, one group of all rows, transposed.
      bits: width of a code.
      symmetric: fix the zero point at ``2**(bits - 1)``.
      importance: ``[width]`` or None.
      clip_search: see :func:`find_grid`.

    Returns:
      ``float16 [N]`` scales and ``uint8 [N]`` zero points. A column of zeros gets scale 1, whose
      codes reproduce it exactly.
    """
    top = 2**bits - 1
    # The grid always contains zero: padding and pruned weights must stay zero.
    low = np.minimum(values.min(axis=0), 0)
    high = np.maximum(values.max(axis=0), 0)
    if symmetric:
        zero = np.full_like(low, 2 ** (bits - 1))
        scale = _storable(np.maximum(low / -zero, high / (top - zero)))
    else:
        scale, zero = _spanning(low, high, top)
    if clip_search:
        search = _Search(values, _normalized(importance, len(values)), scale, zero, top)
        for shrink in map(np.float32, _SHRINKS):
            if symmetric:
                search.attempt(_storable(scale * shrink), zero)
            else:
                search.attempt(*_spanning(low * shrink, high * shrink, top))
                search.attempt(*_spanning(low * shrink, high, top))
                search.attempt(*_spanning(low, high * shrink, top))
        for _ in range(_REFITS):
            search.refit()
        scale, zero = search.scale, search.zero
    scale = np.where(low == high, np.float32(1), scale)
    return scale.astype(np.float16), zero.astype(np.uint8)


def quantize(weight: Float, grid: Grid) -> NDArray[np.uint8]:
    """Round ``weight`` to the nearest codes of ``grid``.

    Args:
      weight: ``float32 [N, K]``.
      grid: scales and zero points for the same shape.

    Returns:
      ``uint8 [N, K]``, each at most ``2**bits - 1``.
    """
    codes = np.empty(weight.shape, np.uint8)
    top = 2**grid.bits - 1
    for index, slab in enumerate(groups(weight.shape[1], grid.group_size)):
        scale = grid.scales[:, index, None].astype(np.float32)
        offsets = np.rint(weight[:, slab] / scale)
        if grid.zero_points is None:
            offsets += 2 ** (grid.bits - 1)
        else:
            offsets += grid.zero_points[:, index, None]
        codes[:, slab] = np.clip(offsets, 0, top)
    return codes


def to_nbits(codes: NDArray[np.uint8], grid: Grid) -> NBitsWeight:
    """Pack ``codes [N, K]`` with the scales and zero points of ``grid``."""
    return NBitsWeight.from_codes(
        codes, grid.scales, grid.zero_points, bits=grid.bits, group_size=grid.group_size
    )


def round_to_nearest(
    weight: Float,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    importance: NDArray[np.floating] | None = None,
    clip_search: bool = True,
) -> NBitsWeight:
    """Quantize ``weight [N, K]`` element by element on the grid that :func:`find_grid` finds."""
    grid = find_grid(
        weight,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        importance=importance,
        clip_search=clip_search,
    )
    return to_nbits(quantize(weight, grid), grid)


def _storable(scale: NDArray[np.floating]) -> Float:
    """``scale`` rounded to float16, without zero and infinity."""
    stored: NDArray[np.float16] = np.clip(scale, _MIN_SCALE, _MAX_SCALE).astype(np.float16)
    return stored.astype(np.float32)


def _spanning(low: Float, high: Float, top: int) -> tuple[Float, Float]:
    """Scale and zero point whose codes span ``low <= 0 <= high``."""
    scale = _storable((high - low) / top)
    return scale, np.clip(np.rint(-low / scale), 0, top)


def _normalized(importance: NDArray[np.floating] | None, width: int) -> Float:
    """Importance with a peak of 1, so that float32 sums neither overflow nor vanish."""
    if importance is None or not (peak := importance.max()) > 0:
        return np.ones(width, np.float32)
    return np.asarray(importance / peak, np.float32)


class _Search:
    """The best grid of a slab so far, by weighted squared error."""

    def __init__(self, values: Float, weights: Float, scale: Float, zero: Float, top: int) -> None:
        self._values = values
        self._weights = weights
        self._top = top
        self._work = np.empty_like(values)
        self._error = np.full(values.shape[1], np.inf, np.float32)
        self.scale = scale.copy()
        self.zero = zero.copy()

    def attempt(self, scale: Float, zero: Float) -> None:
        """Score a candidate per column and keep it where it is better."""
        scaled = self._values * np.reciprocal(scale)
        residual = self._offsets(scaled, zero)
        residual -= scaled
        residual *= residual
        error = (self._weights @ residual) * scale * scale
        better = error < self._error
        np.copyto(self._error, error, where=better)
        np.copyto(self.scale, scale, where=better)
        np.copyto(self.zero, zero, where=better)

    def refit(self) -> None:
        """Least squares for the scale, given the current codes."""
        offsets = self._offsets(self._values * np.reciprocal(self.scale), self.zero)
        weighted = self._weights[:, None] * offsets
        square = np.einsum("kn,kn->n", weighted, offsets)
        product = np.einsum("kn,kn->n", weighted, self._values)
        usable = (square > 0) & (product > 0)
        fitted = np.divide(product, square, out=self.scale.copy(), where=usable)
        self.attempt(_storable(fitted), self.zero.copy())

    def _offsets(self, scaled: Float, zero: Float) -> Float:
        """``code - zero_point`` of every value, in a buffer that the next call reuses."""
        work = np.rint(scaled, out=self._work)
        np.maximum(work, -zero, out=work)
        np.minimum(work, self._top - zero, out=work)
        return work
