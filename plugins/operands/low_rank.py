"""Low-rank factors of a linear, alone and merged with those of its neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.errors import PluginError
from eoracc.plugins.operands.codes import (
    CHUNK,
    FACTOR_BITS,
    LARGEST,
    tile_bytes,
    tile_integers,
    tile_rows,
)

__all__ = [
    "Factor",
    "LowRank",
    "merge_factors",
    "merged_bits",
    "ranked_tiles",
    "split_rows",
]

Factor = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.int8]


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank:
    """Low-rank factors of a linear, ``delta = lora_b @ lora_a``, named and shaped as in PEFT.

    Attributes:
      lora_a: ``float16``, ``float32`` or ``int8 [R, K]``.
      lora_b: ``float16``, ``float32`` or ``int8 [N, R]``.
      lora_a_scale: ``float32 [R]``, multiplies the rows of ``lora_a``: the scale of integer rows,
        or a weight of float rows; None for none.
      lora_b_scale: ``float32 [N]``, the scale of the integer rows of ``lora_b``; else None.
      bits: stored width of an integer value. At 4, both factors hold integers in -7..7, as int8
        here. Float factors ignore it.
    """

    lora_a: Factor
    lora_b: Factor
    lora_a_scale: NDArray[np.float32] | None = None
    lora_b_scale: NDArray[np.float32] | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        """Check types, scales and values.

        Raises:
          PluginError: an integer factor has no scale, or a value does not fit in ``bits``.
        """
        if self.bits not in FACTOR_BITS:
            raise PluginError(f"factors have 8 or 4 bits, not {self.bits}")
        for name in ("lora_a", "lora_b"):
            factor = getattr(self, name)
            is_integer = factor.dtype == np.int8
            has_scale = getattr(self, f"{name}_scale") is not None
            if is_integer != has_scale and (is_integer or name == "lora_b"):
                raise PluginError(f"{name}: integer factors have one scale a row, others have none")
            if self.bits < 8 and not is_integer:
                raise PluginError(f"{name}: holds {factor.dtype}, while int4 factors hold int8")
            if is_integer and np.abs(factor, dtype=np.int16).max(initial=0) > LARGEST[self.bits]:
                raise PluginError(
                    f"{name}: holds a value beyond {LARGEST[self.bits]} at {self.bits} bits"
                )

    @property
    def rank(self) -> int:
        """``R``; 0 turns the correction off."""
        return int(self.lora_a.shape[0])

    @property
    def factor_type(self) -> str:
        """Stored type of ``lora_a``: ``float32``, ``float16``, ``int8`` or ``int4``."""
        return f"int{self.bits}" if self.lora_a.dtype == np.int8 else str(self.lora_a.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of both factors in an artifact, in tiles, scales included; none of rank 0.

        Scales take two bytes where float16 holds them all.
        """
        return self._bytes(half_scales=True)

    @property
    def input_bytes(self) -> int:
        """Bytes of :meth:`tiles`, which an adapter stores; none of rank 0."""
        return self._bytes(half_scales=False)

    def _bytes(self, *, half_scales: bool) -> int:
        if not self.rank:
            return 0
        stored = 0
        for factor, scale in (
            (self.lora_a, self.lora_a_scale),
            (self.lora_b, self.lora_b_scale),
        ):
            bits = self.bits if factor.dtype == np.int8 else 8 * factor.itemsize
            stored += tile_bytes(*factor.shape, bits=bits)
            if scale is not None:
                with np.errstate(over="ignore"):  # what float16 cannot hold becomes inf
                    half = scale.astype(np.float16)
                is_half = half_scales and np.array_equal(scale, half)
                stored += tile_bytes(len(factor), 1, bits=16 if is_half else 32)
        return stored

    def down(self) -> NDArray[np.float32]:
        """The values of ``lora_a``, ``float32 [R, K]``."""
        return _values(self.lora_a, self.lora_a_scale)

    def up(self) -> NDArray[np.float32]:
        """The values of ``lora_b``, ``float32 [N, R]``."""
        return _values(self.lora_b, self.lora_b_scale)

    def product(self) -> NDArray[np.float32]:
        """``lora_b @ lora_a`` as the op computes it, ``float32 [N, K]``."""
        return self.up() @ self.down()

    def tiles(self) -> dict[str, NDArray[np.generic]]:
        """The factors in the tiled layout, by the names of the op's inputs.

        Returns:
          ``lora_a [ceil(R / 16), K, 16]`` and ``lora_b [ceil(N / 16), R, 16]`` in their own float
          type. An integer factor becomes tiles of ``bits``, ``uint8 [ceil(rows / 16),
          ceil(columns / CHUNK[bits]), 64]``, and a ``float32 [ceil(rows / 16) * 16]`` scale.
        """
        tiled: dict[str, NDArray[np.generic]] = {}
        for name, factor, scale in (
            ("lora_a", self.lora_a, self.lora_a_scale),
            ("lora_b", self.lora_b, self.lora_b_scale),
        ):
            if factor.dtype == np.int8:
                tiled[name] = tile_integers(factor.astype(np.int8, copy=False), bits=self.bits)
            else:
                tiled[name] = tile_rows(factor)
            if scale is not None:
                tiled[f"{name}_scale"] = tile_rows(scale[:, None]).reshape(-1)
        return tiled


def split_rows(factors: LowRank, parts: Sequence[int]) -> list[LowRank]:
    """Split the rows of ``lora_b`` into ``parts``, which share ``lora_a``.

    Args:
      factors: those of a linear with ``sum(parts)`` rows.
      parts: rows of each part.
    """
    edges = np.cumsum([0, *parts])
    return [
        replace(
            factors,
            lora_b=factors.lora_b[start:stop],
            lora_b_scale=(
                None if factors.lora_b_scale is None else factors.lora_b_scale[start:stop]
            ),
        )
        for start, stop in pairwise(edges)
    ]


def merge_factors(
    factors: Sequence[LowRank | None], parts: Sequence[int], *, in_features: int, rank: int
) -> LowRank:
    """Merge the factors of linears with one input into those of their stacked rows.

    Args:
      factors: one entry per linear, of rank ``rank`` at most; None for no factors. Integer factors
        of 8 and 4 bits may be mixed and are then stored in 8.
      parts: rows of each linear, in the same order.
      in_features: ``K``.
      rank: ``R`` of each part.

    Returns:
      ``lora_a [P * R, K]``, the rows of all parts in order, and ``lora_b [N, R]``, whose rows
      multiply those of their own part. Ranks beyond a part's own are zero, scales included.

    Raises:
      PluginError: there are no factors at all, or float and integer ones are mixed.
    """
    factors = _of_one_type(factors, in_features)
    present = [own for own in factors if own is not None]

    def stacked(name: str, rows: Sequence[int], columns: int | None = None) -> NDArray[Any] | None:
        like = getattr(present[0], name)
        if like is None:
            return None
        inner = () if columns is None else (columns,)
        whole = np.zeros((sum(rows), *inner), like.dtype)
        for start, own in zip(np.cumsum([0, *rows]), factors, strict=False):
            if own is not None:
                array = getattr(own, name)
                whole[(slice(start, start + len(array)), *map(slice, array.shape[1:]))] = array
        return whole

    ranks = [rank] * len(parts)
    lora_a, lora_b = stacked("lora_a", ranks, in_features), stacked("lora_b", parts, rank)
    assert lora_a is not None and lora_b is not None  # noqa: PT018, S101 - both are always there
    return LowRank(
        lora_a=lora_a,
        lora_b=lora_b,
        lora_a_scale=stacked("lora_a_scale", ranks),
        lora_b_scale=stacked("lora_b_scale", parts),
        bits=present[0].bits,
    )


def ranked_tiles(
    factors: Sequence[LowRank | None], *, in_features: int
) -> dict[str, NDArray[np.generic]]:
    """The factors of linears with one input in tiles, each with its own rank (``ranks``).

    Args:
      factors: one entry per linear, as for :func:`merge_factors`; None counts as rank 0.
      in_features: ``K``.

    Returns:
      By the names of the op's inputs, the tiles of all linears in order: ``lora_a`` and the scales
      as in :meth:`LowRank.tiles`, ``lora_b`` with the first two axes in one.

    Raises:
      PluginError: there are no factors at all, or float and integer ones are mixed.
    """
    alike = _of_one_type(factors, in_features)
    tiled = [own.tiles() for own in alike if own is not None and own.rank]
    if not tiled:
        raise PluginError("merged linears of rank 0 have no factors")
    for own in tiled:
        own["lora_b"] = own["lora_b"].reshape(-1, own["lora_b"].shape[-1])
    return {name: np.concatenate([own[name] for own in tiled]) for name in tiled[0]}


def _of_one_type(factors: Sequence[LowRank | None], in_features: int) -> list[LowRank | None]:
    """``factors`` with a scale of ``lora_a`` in all or none, and integers of one width.

    Raises:
      PluginError: there are no factors at all, or float and integer ones are mixed.
    """
    bits = merged_bits(factors, in_features)
    alike = [None if own is None else replace(own, bits=bits) for own in factors]
    present = [own for own in alike if own is not None]
    kinds = {(own.lora_a.dtype, own.lora_b.dtype) for own in present}
    if len(kinds) != 1:
        names = " and ".join(sorted({own.factor_type for own in factors if own is not None}))
        raise PluginError(f"merged linears have factors of one type, not {names or 'none'}")
    if any(own.lora_a_scale is not None for own in present):
        alike = [None if own is None else _with_scale(own) for own in alike]
    return alike


def merged_bits(factors: Sequence[LowRank | None], in_features: int) -> int:
    """Code width of merged integer factors of linears with ``in_features`` columns.

    The widest of all. With so few columns that 4 bits take as many vectors as 8, the shape could
    not distinguish the two, so codes have 8 bits.
    """
    if in_features <= CHUNK[8]:
        return 8
    return max((own.bits for own in factors if own is not None), default=8)


def _with_scale(factors: LowRank) -> LowRank:
    """``factors`` with a scale for every row of ``lora_a``: their own, or 1."""
    if factors.lora_a_scale is not None:
        return factors
    return replace(factors, lora_a_scale=np.ones(factors.rank, np.float32))


def _values(factor: Factor, scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    values = factor.astype(np.float32)
    return values if scale is None else values * scale[:, None]
