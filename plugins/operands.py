"""Operands of the fused op: an n-bit weight and its low-rank factors, as they are stored.

Storage of the codes is one little-endian bit stream per group: code ``i`` of a group takes the
bits ``[i*bits, (i+1)*bits)``. For 2, 4 and 8 bits this is ONNX Runtime's MatMulNBits layout; for
3 bits eight codes take three bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc import EoraccError

__all__ = ["BITS", "LowRank", "NBitsWeight", "PluginError", "pack_codes", "unpack_codes"]

BITS = (2, 3, 4, 8)
"""Code widths that the op knows."""


class PluginError(EoraccError):
    """The native library is missing or an operand does not fit its op."""


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


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank:
    """Low-rank factors of a linear, ``delta = lora_b @ lora_a``, named and shaped as in PEFT.

    Attributes:
      lora_a: ``float16`` or ``float32 [R, K]``.
      lora_b: ``float16`` or ``float32 [N, R]``.
    """

    lora_a: NDArray[np.float16] | NDArray[np.float32]
    lora_b: NDArray[np.float16] | NDArray[np.float32]

    @property
    def rank(self) -> int:
        """``R``; 0 turns the correction off."""
        return int(self.lora_a.shape[0])

    @property
    def nbytes(self) -> int:
        """Stored bytes of both factors."""
        return self.lora_a.nbytes + self.lora_b.nbytes

    def product(self) -> NDArray[np.float32]:
        """``lora_b @ lora_a`` as the op computes it, ``float32 [N, K]``."""
        return self.lora_b.astype(np.float32) @ self.lora_a.astype(np.float32)
