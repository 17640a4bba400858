"""Published figures of NVIDIA GPUs, and bounds derived from them: occupancy and roofline.

Limits of a multiprocessor are from the CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability"; the allocation of registers and shared memory follows the occupancy calculator
in Nsight Compute. Rates are peaks from data sheets and whitepapers: dense float16 products with
float32 sums, and boost clocks. A real kernel reaches less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["GPUS", "LIMITS", "Bound", "Gpu", "Limits", "Product", "bound", "occupancy"]

_REGISTERS = 65536
_REGISTER_UNIT = 256  # of a warp
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024  # of a block, from capability 8.0 on
_WARPS_TOGETHER = 4  # registers are allocated equally to the four partitions of a multiprocessor


@dataclass(frozen=True)
class Limits:
    """Limits of a multiprocessor: resident warps and blocks, bytes of shared memory."""

    warps: int
    blocks: int
    shared_bytes: int


LIMITS: Mapping[int, Limits] = {
    80: Limits(64, 32, 164 * 1024),
    86: Limits(48, 16, 100 * 1024),
    87: Limits(48, 16, 164 * 1024),
    89: Limits(48, 24, 100 * 1024),
    90: Limits(64, 32, 228 * 1024),
    100: Limits(64, 32, 228 * 1024),
    120: Limits(48, 24, 100 * 1024),
}
"""Limits by compute capability, major * 10 + minor."""


def occupancy(capability: int, *, num_warps: int, registers: int, shared_bytes: int) -> float:
    """Share of a multiprocessor's warps that fit with these resources, 0..1.

    Args:
      capability: one of :data:`LIMITS`.
      num_warps: of a block.
      registers: of a thread.
      shared_bytes: of a block.

    >>> occupancy(80, num_warps=4, registers=64, shared_bytes=12 * 1024)
    0.5
    """
    limits = LIMITS[capability]
    of_warp = _ceil(registers * 32, _REGISTER_UNIT)
    warps = _REGISTERS // of_warp // _WARPS_TOGETHER * _WARPS_TOGETHER
    of_block = _ceil(shared_bytes + _SHARED_RESERVED, _SHARED_UNIT)
    blocks = min(
        limits.blocks,
        limits.warps // num_warps,
        warps // num_warps,
        limits.shared_bytes // of_block,
    )
    return blocks * num_warps / limits.warps


def _ceil(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Gpu:
    """A GPU that represents its compute capability.

    Attributes:
      name: of the product.
      capability: major * 10 + minor.
      bandwidth: of its memory, bytes a second.
      flops: of its tensor cores, a second.
      multiprocessors: that it has.
      clock: boost, Hz.
    """

    name: str
    capability: int
    bandwidth: float
    flops: float
    multiprocessors: int
    clock: float

    @property
    def cache_bandwidth(self) -> float:
        """From the L2 cache, bytes a second.

        The A100 whitepaper gives 5120 bytes a clock for 108 multiprocessors. NVIDIA publishes no
        figure for the others, so the same rate per multiprocessor is assumed.
        """
        return 5120 / 108 * self.multiprocessors * self.clock


GPUS = (
    Gpu("A100 80GB SXM", 80, 2.039e12, 312e12, 108, 1.41e9),
    Gpu("A10", 86, 0.600e12, 125e12, 72, 1.695e9),
    Gpu("AGX Orin 64GB", 87, 0.2048e12, 42.5e12, 16, 1.3e9),
    Gpu("L4", 89, 0.300e12, 121e12, 58, 2.04e9),
    Gpu("H100 SXM", 90, 3.35e12, 989e12, 132, 1.83e9),
    Gpu("B200", 100, 8.0e12, 2250e12, 148, 1.85e9),
    Gpu("RTX 5090", 120, 1.792e12, 209.5e12, 170, 2.41e9),
)


@dataclass(frozen=True)
class Product:
    """One linear ``[N, K]`` and M rows of 16-bit activations; 16 ``bits`` mean plain float16."""

    rows: int
    out_features: int
    in_features: int
    bits: int
    group_size: int = 128
    rank: int = 0

    @property
    def flops(self) -> int:
        """Floating-point operations of both terms."""
        return (
            2
            * self.rows
            * (
                self.out_features * self.in_features
                + self.rank * (self.in_features + self.out_features)
            )
        )

    @property
    def bytes(self) -> int:
        """Bytes of each operand and the result, once; one 16-bit scale a group, no zero points."""
        n, k = self.out_features, self.in_features
        weight = n * k * self.bits // 8
        if self.bits < 16:
            weight += 2 * n * -(-k // self.group_size)
        return weight + 2 * self.rank * (n + k) + 2 * self.rows * (n + k)


@dataclass(frozen=True)
class Bound:
    """Least busy time of each resource in seconds; the longest bounds the product."""

    memory: float
    tensor_cores: float
    cache: float

    @property
    def seconds(self) -> float:
        """The lower bound in seconds."""
        return max(self.memory, self.tensor_cores, self.cache)

    @property
    def by(self) -> str:
        """The resource that bounds the product."""
        named = {"memory": self.memory, "tensor cores": self.tensor_cores, "cache": self.cache}
        return max(named, key=named.__getitem__)


def bound(gpu: Gpu, product: Product, *, block_m: int = 0, block_n: int = 0) -> Bound:
    """The roofline of ``product``.

    Args:
      gpu: the GPU.
      product: the product.
      block_m: rows of a program's tile, for one launch: each program then multiplies X with all of
        lora_a, reads lora_a from the cache, and adds these products to the others. 0 for a
        down-projection that is computed once.
      block_n: outputs of a program's tile, likewise.
    """
    cache, flops = 0.0, float(product.flops)
    if block_n:
        programs = -(-product.rows // block_m) * -(-product.out_features // block_n)
        down = product.rank * product.in_features
        cache = programs * 2 * down / gpu.cache_bandwidth
        flops += 2 * down * (programs * block_m - product.rows)
    return Bound(product.bytes / gpu.bandwidth, flops / gpu.flops, cache)
