"""An n-bit weight: its codes, scales and zero points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.codes import (
    pack_codes,
    tile_bytes,
    tile_codes,
    tile_rows,
    unpack_codes,
    untile_codes,
    untile_rows,
)

__all__ = [
    "NIBBLE",
    "NBitsWeight",
    "weight_bytes",
    "zero_point_bits",
]


NIBBLE = 4
"""Bits of half a byte, which holds the zero points of codes that are no wider."""


def zero_point_bits(bits: int) -> int:
    """Bits of a stored zero point of codes of ``bits``; the op reads bytes (docs/op.md)."""
    return NIBBLE if bits <= NIBBLE else 8


def weight_bytes(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    groups: int,
    scale_bytes: int,
    zero_points: bool,
) -> int:
    """Bytes of a weight in tiles, :attr:`NBitsWeight.nbytes`.

    Args:
      out_features: ``N``.
      in_features: ``K``.
      bits: of a code.
      groups: of a row, ``G``.
      scale_bytes: of one scale.
      zero_points: whether there are any, of half a byte each, or a byte for codes above four bits.

    >>> weight_bytes(576, 100, bits=3, groups=2, scale_bytes=2, zero_points=True)
    30528
    """
    per_group = 8 * scale_bytes + (zero_point_bits(bits) if zero_points else 0)
    codes = tile_bytes(out_features, in_features, bits=bits)
    return codes + tile_bytes(out_features, groups, bits=per_group)


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
        """Pack ``codes [N, K]``; the other arrays are kept as they are."""
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
        """Stored bytes in tiles: codes, scales and zero points."""
        rows, groups = self.scales.shape
        return weight_bytes(
            rows,
            self.in_features,
            bits=self.bits,
            groups=groups,
            scale_bytes=self.scales.itemsize,
            zero_points=self.zero_points is not None,
        )

    def tiles(self) -> dict[str, NDArray[np.generic]]:
        """The weight in the tiled layout, by the names of the op's inputs.

        Returns:
          ``B uint8 [ceil(N / 16), chunks, bytes]``, ``scales [ceil(N / 16), G, 16]`` and, if
          present, ``zero_points uint8 [ceil(N / 16), G, 16]``.
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
