"""Operands of the fused op: an n-bit weight and its low-rank factors, as they are stored.

There are two layouts. The **plain** one (``layout`` 0) is what the compiler works on: rows of W one
after another, the codes of a group one little-endian bit stream, code ``i`` in the bits
``[i*bits, (i+1)*bits)``. For 2, 4 and 8 bits this is ONNX Runtime's MatMulNBits layout; for 3 bits
eight codes take three bytes.

The **tiled** one (``layout`` 1) is the order in which the kernels read. 16 rows of W form a tile,
and a *quad* is 4 consecutive columns of it: 64 codes, one in each byte of a vector of 64 bytes, at
``4 * row + column``. A *chunk* is the least run of quads that fills whole vectors:

====  ======  =======================  ====================================================
bits  quads   vectors                  where a code lies in its bytes
====  ======  =======================  ====================================================
8     1       1                        the byte
4     2       1                        quad 0 in the low half, quad 1 in the high half
2     4       1                        quad ``m`` in the bits ``[2m, 2m + 2)``
3     8       3                        the low two bits of quads 0..3 in vector 0 and of quads
                                       4..7 in vector 1, both as at 2 bits; the high bit of
                                       quad ``q`` is bit ``q`` of vector 2
====  ======  =======================  ====================================================

What goes by rows of W (scales, zero points, float factors) is tiled the same way, without quads:
``[rows, columns]`` becomes ``[ceil(rows / 16), columns, 16]``. :func:`tile_codes` and
:func:`tile_rows` convert, :func:`untile_codes` and :func:`untile_rows` convert back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from eoracc.errors import PluginError

__all__ = [
    "BITS",
    "CHUNK",
    "FACTOR_BITS",
    "LARGEST",
    "TILE",
    "LowRank",
    "NBitsWeight",
    "merge_factors",
    "merged_bits",
    "pack_codes",
    "split_rows",
    "tile_codes",
    "tile_integers",
    "tile_rows",
    "unpack_codes",
    "untile_codes",
    "untile_integers",
    "untile_rows",
]

BITS = (2, 3, 4, 8)
"""Code widths that the op knows."""

TILE = 16
"""Rows of W in a tile."""

CHUNK: Mapping[int, int] = {2: 16, 3: 32, 4: 8, 8: 4}
"""Columns of a chunk by code width."""

FACTOR_BITS = (8, 4)
"""Code widths of integer factors."""

LARGEST: Mapping[int, int] = {8: 127, 4: 7}
"""Largest magnitude of an integer factor's values by code width; the codes are symmetric about 0,
which is stored as ``2**(bits - 1)``."""

_QUAD = 4
_VECTOR = TILE * _QUAD

_Scalar = TypeVar("_Scalar", bound=np.generic)


def pack_codes(codes: NDArray[np.uint8], *, bits: int, group_size: int) -> NDArray[np.uint8]:
    """Pack integer codes into the stored layout.

    Args:
      codes: ``[N, K]``, each below ``2**bits``.
      bits: one of :data:`BITS`.
      group_size: codes per group, a multiple of 8; the last group is padded with zero bits.

    Returns:
      ``uint8 [N, ceil(K / group_size), group_size * bits / 8]``.

    >>> pack_codes(np.arange(8, dtype=np.uint8)[None], bits=3, group_size=8).tolist()
    [[[136, 198, 250]]]
    """
    rows, columns = codes.shape
    groups = -(-columns // group_size)
    padded = np.zeros((rows, groups * group_size), np.uint8)
    padded[:, :columns] = codes
    if bits == 8:
        return padded.reshape(rows, groups, group_size)
    # Eight codes always fill whole bytes (`bits` of them), so one uint32 holds a run of eight
    # for every width that is left.
    runs = padded.reshape(rows, groups * group_size // 8, 8).astype(np.uint32)
    words = (runs << np.arange(0, 8 * bits, bits, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32)
    stream = words[..., None].view(np.uint8)[..., :bits]
    return np.ascontiguousarray(stream).reshape(rows, groups, group_size * bits // 8)


def unpack_codes(packed: NDArray[np.uint8], *, bits: int, in_features: int) -> NDArray[np.uint8]:
    """Inverse of :func:`pack_codes`.

    Returns:
      ``uint8 [N, K]``.

    >>> unpack_codes(np.array([[[136, 198, 250]]], np.uint8), bits=3, in_features=8).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    rows, groups, group_bytes = packed.shape
    if bits == 8:
        return np.ascontiguousarray(packed.reshape(rows, groups * group_bytes)[:, :in_features])
    runs = packed.reshape(rows, groups * group_bytes // bits, bits)
    words = np.zeros((*runs.shape[:2], 4), np.uint8)
    words[..., :bits] = runs
    shifts = np.arange(0, 8 * bits, bits, dtype=np.uint32)
    codes = (words.view(np.uint32) >> shifts) & np.uint32(2**bits - 1)
    flat = codes.astype(np.uint8).reshape(rows, 8 * runs.shape[1])
    return np.ascontiguousarray(flat[:, :in_features])


def tile_codes(codes: NDArray[np.uint8], *, bits: int, padding: int = 0) -> NDArray[np.uint8]:
    """Pack integer codes into the tiled layout.

    Args:
      codes: ``[N, K]``, each below ``2**bits``.
      bits: one of :data:`BITS`.
      padding: code of the rows and columns that fill up tiles and chunks.

    Returns:
      ``uint8 [ceil(N / 16), ceil(K / CHUNK[bits]), 64]``, at 3 bits ``192`` in the last place.

    >>> tile_codes(np.arange(16, dtype=np.uint8).reshape(2, 8), bits=4)[0, 0, :9].tolist()
    [64, 81, 98, 115, 200, 217, 234, 251, 0]
    """
    rows, columns = codes.shape
    tiles, chunks = -(-rows // TILE), -(-columns // CHUNK[bits])
    padded = np.full((tiles * TILE, chunks * CHUNK[bits]), padding, np.uint8)
    padded[:rows, :columns] = codes
    # [tile, chunk, quad, byte]: a quad's rows and columns are the bytes of a vector.
    per_chunk = CHUNK[bits] // _QUAD
    quads = padded.reshape(tiles, TILE, chunks, per_chunk, _QUAD).transpose(0, 2, 3, 1, 4)
    quads = quads.reshape(tiles, chunks, per_chunk, _VECTOR)
    if bits == 3:
        low = _stack_bits((quads & np.uint8(3)).reshape(tiles, chunks, 2, 4, _VECTOR), 2)
        high = _stack_bits(quads >> np.uint8(2), 1)
        return np.concatenate([low.reshape(tiles, chunks, 2 * _VECTOR), high], axis=-1)
    return _stack_bits(quads, bits)


def untile_codes(
    tiled: NDArray[np.uint8], *, bits: int, out_features: int, in_features: int
) -> NDArray[np.uint8]:
    """Inverse of :func:`tile_codes`.

    Returns:
      ``uint8 [out_features, in_features]``.
    """
    tiles, chunks = tiled.shape[:2]
    if bits == 3:
        low = _split_bits(tiled[..., : 2 * _VECTOR].reshape(tiles, chunks, 2, _VECTOR), 2)
        high = _split_bits(tiled[..., 2 * _VECTOR :], 1)
        quads = low.reshape(high.shape) | high << np.uint8(2)
    else:
        quads = _split_bits(tiled, bits)
    per_chunk = CHUNK[bits] // _QUAD
    rows = quads.reshape(tiles, chunks, per_chunk, TILE, _QUAD).transpose(0, 3, 1, 2, 4)
    rows = rows.reshape(tiles * TILE, chunks * CHUNK[bits])
    return np.ascontiguousarray(rows[:out_features, :in_features])


def _stack_bits(parts: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """``[..., m, bytes]`` to ``[..., bytes]``, part ``m`` at bit ``width * m`` of every byte."""
    shifts = np.arange(0, width * parts.shape[-2], width, dtype=np.uint8)[:, None]
    stacked: NDArray[np.uint8] = np.bitwise_or.reduce(parts << shifts, axis=-2)
    return stacked


def _split_bits(stacked: NDArray[np.uint8], width: int) -> NDArray[np.uint8]:
    """Inverse of :func:`_stack_bits`."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    parts: NDArray[np.uint8] = stacked[..., None, :] >> shifts & np.uint8(2**width - 1)
    return parts


def tile_rows(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    """What belongs to rows of W, ``[rows, columns]``, as ``[ceil(rows / 16), columns, 16]``.

    Scales and zero points ``[N, G]`` and float factors ``[R, K]`` and ``[N, R]`` are stored so.
    Rows that fill up the last tile are 0.

    >>> tile_rows(np.array([[1, 2], [3, 4]]))[0, :, :3].tolist()
    [[1, 3, 0], [2, 4, 0]]
    """
    rows, columns = array.shape
    tiles = -(-rows // TILE)
    padded = np.zeros((tiles * TILE, columns), array.dtype)
    padded[:rows] = array
    return np.ascontiguousarray(padded.reshape(tiles, TILE, columns).transpose(0, 2, 1))


def tile_integers(values: NDArray[np.int8], *, bits: int) -> NDArray[np.uint8]:
    """An integer factor as tiles of ``bits``, the value 0 stored as ``2**(bits - 1)``.

    Args:
      values: ``[rows, columns]``, of magnitudes up to ``LARGEST[bits]``.
      bits: one of :data:`FACTOR_BITS`.

    Returns:
      ``uint8 [ceil(rows / 16), ceil(columns / CHUNK[bits]), 64]``; what fills up tiles is 0 too.

    >>> tile_integers(np.array([[-127, 0, 5]], np.int8), bits=8)[0, 0, :5].tolist()
    [1, 128, 133, 128, 128]
    >>> tile_integers(np.array([[-7, 0, 5]], np.int8), bits=4)[0, 0, :5].tolist()
    [129, 136, 141, 136, 136]
    """
    zero = 2 ** (bits - 1)
    codes = (values.astype(np.int16) + zero).astype(np.uint8)
    return tile_codes(codes, bits=bits, padding=zero)


def untile_integers(
    tiled: NDArray[np.uint8], *, bits: int, rows: int, columns: int
) -> NDArray[np.int8]:
    """Inverse of :func:`tile_integers`: ``int8 [rows, columns]``."""
    codes = untile_codes(tiled, bits=bits, out_features=rows, in_features=columns)
    values: NDArray[np.int8] = (codes.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)
    return values


def untile_rows(tiled: NDArray[_Scalar], rows: int) -> NDArray[_Scalar]:
    """Inverse of :func:`tile_rows`: ``[rows, columns]``."""
    tiles, columns, _ = tiled.shape
    plain = tiled.transpose(0, 2, 1).reshape(tiles * TILE, columns)
    return np.ascontiguousarray(plain[:rows])


@dataclass(frozen=True, eq=False, kw_only=True)
class NBitsWeight:
    """A weight of ``bits`` per element with a scale (and a zero point) per group of a row.

    The value of code ``c`` is ``(c - zero_point) * scale``; without zero points it is
    ``2**(bits - 1)``. The last group of a row may be shorter than ``group_size``: its padding
    codes never reach a product.

    Attributes:
      packed: ``uint8 [N, G, group_size * bits / 8]`` with ``G = ceil(K / group_size)``.
      scales: ``float16`` or ``float32 [N, G]``.
      zero_points: ``uint8 [N, G]``, or None for symmetric codes.
      bits: one of :data:`BITS`.
      group_size: a multiple of 8.
      in_features: ``K``.
    """

    packed: NDArray[np.uint8]
    scales: NDArray[np.float16] | NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    bits: int
    group_size: int
    in_features: int

    @classmethod
    def from_codes(
        cls,
        codes: NDArray[np.uint8],
        scales: NDArray[np.float16] | NDArray[np.float32],
        zero_points: NDArray[np.uint8] | None,
        *,
        bits: int,
        group_size: int,
    ) -> NBitsWeight:
        """Pack ``codes [N, K]`` and keep the rest as it is."""
        return cls(
            packed=pack_codes(codes, bits=bits, group_size=group_size),
            scales=scales,
            zero_points=zero_points,
            bits=bits,
            group_size=group_size,
            in_features=codes.shape[1],
        )

    @property
    def out_features(self) -> int:
        """``N``."""
        return int(self.packed.shape[0])

    @property
    def nbytes(self) -> int:
        """Stored bytes: codes, scales and zero points."""
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.packed.nbytes + self.scales.nbytes + zero_points

    def tiles(self) -> dict[str, NDArray[np.generic]]:
        """The weight in the tiled layout, by the names of the op's inputs.

        Returns:
          ``B uint8 [ceil(N / 16), chunks, bytes]``, ``scales [ceil(N / 16), G, 16]`` and, where
          there are any, ``zero_points uint8 [ceil(N / 16), G, 16]``.
        """
        tiled: dict[str, NDArray[np.generic]] = {
            "B": tile_codes(self.codes(), bits=self.bits),
            "scales": tile_rows(self.scales),
        }
        if self.zero_points is not None:
            tiled["zero_points"] = tile_rows(self.zero_points)
        return tiled

    @classmethod
    def from_tiles(
        cls,
        packed: NDArray[np.uint8],
        scales: NDArray[np.float16] | NDArray[np.float32],
        zero_points: NDArray[np.uint8] | None,
        *,
        bits: int,
        group_size: int,
        out_features: int,
        in_features: int,
    ) -> NBitsWeight:
        """Inverse of :meth:`tiles`."""
        codes = untile_codes(packed, bits=bits, out_features=out_features, in_features=in_features)
        return cls.from_codes(
            codes,
            untile_rows(scales, out_features),  # type: ignore[arg-type]
            None if zero_points is None else untile_rows(zero_points, out_features),
            bits=bits,
            group_size=group_size,
        )

    def codes(self) -> NDArray[np.uint8]:
        """The integer codes, ``uint8 [N, K]``."""
        return unpack_codes(self.packed, bits=self.bits, in_features=self.in_features)

    def dequantize(self) -> NDArray[np.float32]:
        """The weight that the op multiplies with, ``float32 [N, K]``."""
        rows, groups = self.scales.shape
        codes = unpack_codes(
            self.packed, bits=self.bits, in_features=groups * self.group_size
        ).reshape(rows, groups, self.group_size)
        values = codes.astype(np.float32)
        if self.zero_points is None:
            values -= np.float32(2 ** (self.bits - 1))
        else:
            values -= self.zero_points.astype(np.float32)[:, :, None]
        values *= self.scales.astype(np.float32)[:, :, None]
        flat = values.reshape(rows, groups * self.group_size)
        return np.ascontiguousarray(flat[:, : self.in_features])


Factor = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.int8]


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank:
    """Low-rank factors of a linear, ``delta = lora_b @ lora_a``, named and shaped as in PEFT.

    Attributes:
      lora_a: ``float16``, ``float32`` or ``int8 [R, K]``.
      lora_b: ``float16``, ``float32`` or ``int8 [N, R]``.
      lora_a_scale: ``float32 [R]``, what a row of ``lora_a`` is multiplied with: integer ones have
        a scale, float ones may have a weight; else None.
      lora_b_scale: ``float32 [N]``, likewise of ``lora_b``.
      bits: that an integer value is stored in. 4: both factors are of integers in -7..7, held here
        as int8. Without meaning for float factors.
    """

    lora_a: Factor
    lora_b: Factor
    lora_a_scale: NDArray[np.float32] | None = None
    lora_b_scale: NDArray[np.float32] | None = None
    bits: int = 8

    def __post_init__(self) -> None:
        """Check that what is of integers has scales.

        Raises:
          PluginError: it is not so, or a value does not fit in ``bits``.
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
        """What ``lora_a`` is stored in: ``float32``, ``float16``, ``int8`` or ``int4``."""
        return f"int{self.bits}" if self.lora_a.dtype == np.int8 else str(self.lora_a.dtype)

    @property
    def nbytes(self) -> int:
        """Stored bytes of both factors, scales included."""
        factors = (self.lora_a, self.lora_b)
        stored = sum(factor.nbytes for factor in factors)
        if self.bits < 8:
            stored = sum(-(-factor.size * self.bits // 8) for factor in factors)
        scales = (self.lora_a_scale, self.lora_b_scale)
        return stored + sum(scale.nbytes for scale in scales if scale is not None)

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
    """Factors of one linear as those of ``parts`` of its rows, which share ``lora_a``.

    Args:
      factors: of ``sum(parts)`` rows.
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
    """Factors of linears that share an input as those of the one linear of their stacked rows.

    Args:
      factors: of each linear, of ranks up to ``rank``; None for one that has none. Integer ones of
        8 and of 4 bits may stand side by side and are then stored in 8.
      parts: rows of each linear, in the same order.
      in_features: ``K``.
      rank: ``R`` of each part.

    Returns:
      ``lora_a [P * R, K]``, one part's rows after the other's, and ``lora_b [N, R]``, whose rows
      multiply those of their own part; zero, scales included, beyond a part's own rank.

    Raises:
      PluginError: there are no factors at all, or float ones beside integer ones.
    """
    if any(one is not None and one.lora_a_scale is not None for one in factors):
        factors = [None if one is None else _with_scale(one) for one in factors]
    present = [one for one in factors if one is not None]
    kinds = {(one.lora_a.dtype, one.lora_b.dtype) for one in present}
    if len(kinds) != 1:
        names = " and ".join(sorted({one.factor_type for one in present})) or "none"
        raise PluginError(f"merged linears have factors of one type, not {names}")

    def stacked(name: str, rows: Sequence[int], columns: int | None = None) -> NDArray[Any] | None:
        like = getattr(present[0], name)
        if like is None:
            return None
        inner = () if columns is None else (columns,)
        whole = np.zeros((sum(rows), *inner), like.dtype)
        for start, one in zip(np.cumsum([0, *rows]), factors, strict=False):
            if one is not None:
                array = getattr(one, name)
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
        bits=merged_bits(factors, in_features),
    )


def merged_bits(factors: Sequence[LowRank | None], in_features: int) -> int:
    """Bits of a code when integer factors of linears with ``in_features`` columns are merged.

    The widest that any has. In tiles of so few columns that codes of 4 bits would take as many
    vectors as those of 8, nothing would tell them apart: they are stored in 8 as well.
    """
    if in_features <= CHUNK[8]:
        return 8
    return max((one.bits for one in factors if one is not None), default=8)


def _with_scale(factors: LowRank) -> LowRank:
    """``factors`` with a scale of every row of ``lora_a``, 1 where they have none."""
    if factors.lora_a_scale is not None:
        return factors
    return replace(factors, lora_a_scale=np.ones(factors.rank, np.float32))


def _values(factor: Factor, scale: NDArray[np.float32] | None) -> NDArray[np.float32]:
    values = factor.astype(np.float32)
    return values if scale is None else values * scale[:, None]
