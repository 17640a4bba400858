"""Stored weights in a form that TensorRT can dequantize: signed 4 or 8 bits times a scale.

TensorRT's ``DequantizeLinear`` is symmetric: a value is ``code * scale``, the code in -8..7 or
-128..127, the scale that of a block of input features, in the type of the product. A stored weight
``(code - zero_point) * scale`` becomes that exactly:

==============================  =================================================================
2 and 3 bits                    ``code - zero_point``, widened to 4 bits
4 and 8 bits, symmetric         ``code - zero_point``
6 bits                          ``code - zero_point``, widened to 8 bits
4 and 8 bits, with zero points  ``code - half``; for each half of a block ``zero_point - half``
                                times the scale multiplies the sum of its inputs and is subtracted
groups that do not divide K     blocks of the greatest common divisor, the scale repeated
an odd number of 4-bit codes    widened to 8 bits, since TensorRT packs two a byte
==============================  =================================================================

Halves of blocks, since TensorRT takes no blocks of one. Integers stay what they are. Scales, and
factors of floats, take the type of the graph; what that rounds is rounded in the model that the
graph is compared with, too (:func:`rounded_product`). Artifacts store both as float16 unless told
otherwise, so that a float16 graph changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.compiler.targets.tensorrt.half_precision import round_scales, round_to
from eoracc.errors import PassError
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

__all__ = ["SignedFactor", "SignedWeight", "rounded_product", "signed_factors"]

_RANGE = {4: (-8, 7), 8: (-128, 127)}
"""Smallest and largest code by its bits."""


@dataclass(frozen=True, eq=False)
class SignedWeight:
    """A weight as ``(code - offset) * scale``, code and offset signed, a scale for each block.

    Arrays are made anew whenever they are asked for, so that a graph holds none of them.

    Attributes:
      name: of the linear or table, for messages.
      stored: as compression stored it.
      dtype: of the scales.
    """

    name: str
    stored: NBitsWeight
    dtype: ir.DataType

    @property
    def shape(self) -> tuple[int, int]:
        """``(N, K)``."""
        return self.stored.out_features, self.stored.in_features

    @property
    def block(self) -> int:
        """Input features that share a scale; it divides K."""
        return math.gcd(self.stored.in_features, self.stored.group_size)

    @property
    def blocks(self) -> int:
        """``G``, of a row."""
        return self.stored.in_features // self.block

    @property
    def bits(self) -> int:
        """Bits of a stored code, 4 or 8."""
        return 4 if self.stored.bits <= 4 and _fill_bytes(*self.shape) else 8

    @property
    def offset_bits(self) -> int:
        """Bits of a stored offset, 4 or 8; 0 without offsets.

        Raises:
          PassError: blocks with offsets cannot be halved, or an offset takes more than 8 bits.
        """
        if self._is_direct:
            return 0
        if self.block % 2:
            raise PassError(
                self.name,
                f"has {self.shape[1]} input features, so that its blocks cannot be halved for "
                "TensorRT: quantize it with 'symmetric: true'",
            )
        offsets = self._zero_points() - self._base
        for bits, (low, high) in _RANGE.items():
            if low <= offsets.min() and offsets.max() <= high:
                return bits
        raise PassError(
            self.name,
            f"has a zero point of {self._zero_points().max()} at {self.stored.bits} bits, which no "
            "pass makes and TensorRT cannot store: quantize it again",
        )

    def codes(self) -> NDArray[np.int8]:
        """``[N, K]``."""
        codes = self.stored.codes().astype(np.int16)
        if self._is_direct and self.stored.zero_points is not None:
            codes -= self._per_block(self._zero_points()).repeat(self.block, axis=1)
        else:
            codes -= self._base
        return codes.astype(np.int8)

    def scales(self) -> NDArray[Any]:
        """``[N, G]``.

        Raises:
          ModelError: one is beyond the type of the graph.
        """
        rounded = round_scales(self.stored.scales, self.dtype, self.name)
        return self._per_block(rounded)

    def offsets(self) -> NDArray[np.int8]:
        """``[N, 2 G]``, of each half of a block."""
        return self._per_block(self._zero_points() - self._base).repeat(2, axis=1).astype(np.int8)

    @property
    def _is_direct(self) -> bool:
        """Whether every ``code - zero_point`` is in the range of codes."""
        zero_points = self._zero_points()
        low, high = _RANGE[self.bits]
        largest = 2**self.stored.bits - 1
        return bool(low <= -zero_points.max() and largest - zero_points.min() <= high)

    @property
    def _base(self) -> int:
        """Subtracted from codes and zero points alike."""
        return int(2 ** (self.stored.bits - 1))

    def _zero_points(self) -> NDArray[np.int16]:
        if self.stored.zero_points is None:
            return np.full(self.stored.scales.shape, self._base, np.int16)
        return self.stored.zero_points.astype(np.int16)

    def _per_block(self, groups: NDArray[Any]) -> NDArray[Any]:
        """Values per group, ``[N, groups]``, repeated per block."""
        repeated = groups.repeat(self.stored.group_size // self.block, axis=1)
        return np.ascontiguousarray(repeated[:, : self.blocks])


@dataclass(frozen=True, eq=False)
class SignedFactor:
    """A low-rank factor as the graph stores it.

    Attributes:
      values: ``[rows, columns]`` of the graph's type, or int8 with ``scales``.
      scales: ``[rows]`` of the graph's type; None for floats.
      bits: that an integer is stored in.
    """

    values: NDArray[Any]
    scales: NDArray[Any] | None
    bits: int

    def product(self) -> NDArray[np.float32]:
        """The weight of the graph, ``float32 [rows, columns]``."""
        values = self.values.astype(np.float32)
        return values if self.scales is None else values * self.scales.astype(np.float32)[:, None]


def signed_factors(
    factors: LowRank, dtype: ir.DataType, name: str
) -> tuple[SignedFactor, SignedFactor]:
    """``lora_a [R, K]`` and ``lora_b [N, R]`` as a graph of ``dtype`` stores them.

    Float ones take up a weight that goes with their rows.

    Raises:
      ModelError: a value is beyond the type; ``name`` is the linear's.
    """
    made = []
    for array, scale, values in (
        (factors.lora_a, factors.lora_a_scale, factors.down),
        (factors.lora_b, factors.lora_b_scale, factors.up),
    ):
        where = f"{name}: a low-rank factor"
        if array.dtype == np.int8:
            assert scale is not None  # noqa: S101 - LowRank has checked it
            bits = factors.bits if _fill_bytes(*array.shape) else 8
            made.append(SignedFactor(array, round_to(scale, dtype, where), bits))
        else:
            made.append(SignedFactor(round_to(values(), dtype, where), None, 0))
    return made[0], made[1]


def _fill_bytes(rows: int, columns: int) -> bool:
    """Whether this number of 4-bit codes fills whole bytes."""
    return rows * columns % 2 == 0


def rounded_product(
    name: str, weight: NBitsWeight, factors: LowRank | None, dtype: ir.DataType
) -> NDArray[np.float32]:
    """The weight of a graph of ``dtype`` for a stored weight, ``float32 [N, K]``.

    Args:
      name: of the linear or table, for messages.
      weight: as compression stored it; only its scales are rounded.
      factors: of its low-rank compensation; None for none.
      dtype: of the graph.

    Raises:
      ModelError: a value is beyond ``dtype``.
    """
    scales = round_scales(weight.scales, dtype, name).astype(np.float32)
    product = replace(weight, scales=scales).dequantize()
    if factors is not None:
        a, b = signed_factors(factors, dtype, name)
        product += b.product() @ a.product()
    return product
