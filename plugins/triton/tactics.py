"""Variants and tilings of the Triton kernels. Works without Triton."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from eoracc.errors import PluginError
from eoracc.plugins.operands.codes import BITS

__all__ = [
    "CAPABILITIES",
    "FEW_RANKS",
    "FEW_ROWS",
    "LARGEST_RANK",
    "SHARED_BYTES",
    "DownTactic",
    "Dtype",
    "LowRankForm",
    "Tactic",
    "Variant",
    "down_arguments",
    "tactics",
]

CAPABILITIES = (80, 86, 87, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled and checked for, major * 10 + minor."""

LARGEST_RANK = 256
"""Largest rank of a low-rank term; ranks are multiples of 16."""

FEW_ROWS = 16
"""Largest number of rows at which reading the weight bounds the product."""

FEW_RANKS = 32
"""Largest rank at which one launch should be faster with few rows. Beyond, its programs take longer
to read lora_a from the L2 cache than to read the weight from memory."""

SHARED_BYTES = 48 * 1024
"""Shared memory of a launch by default; TensorRT's plugins cannot request more."""

_WARP_GROUP_PRODUCTS = (90, 100)
"""Capabilities whose tensor cores multiply tiles of 64 rows of W or more at a time."""

_DOWN_VALUES = 4096
"""Sums of ``X lora_a^T`` that a program keeps in registers beside its outputs."""

Dtype = Literal["float16", "bfloat16", "float32"]
LowRankForm = Literal["none", "one_launch", "two_launches"]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Types and operands for :func:`~eoracc.plugins.triton.kernel.matmul_nbits_low_rank`.

    Sizes (M, N, K, R) are arguments of a launch: one variant serves all linears of a model that are
    stored alike.

    Attributes:
      bits: 2, 3, 4, 6 or 8.
      group_size: columns per scale, a multiple of 16.
      dtype: type of X and Y, ``float16`` or ``bfloat16``.
      scale_dtype: type of the scales.
      factor_dtype: stored type of ``lora_a`` and ``lora_b``; they are multiplied in ``dtype``.
      zero_points: whether there are zero points; without them they are ``2**(bits - 1)``.
      bias: whether there is a bias, of ``dtype``.
      low_rank: no low-rank term, one in this launch, or one from the sums of a previous launch.
      down_dtype: type of those sums.
      aligned: whether K and R are multiples of 16, which allows wide loads. Pointers always are.
    """

    bits: int
    group_size: int
    dtype: Dtype = "float16"
    scale_dtype: Dtype = "float16"
    factor_dtype: Dtype = "float16"
    down_dtype: Dtype = "float32"
    zero_points: bool = False
    bias: bool = False
    low_rank: LowRankForm = "none"
    aligned: bool = True

    def __post_init__(self) -> None:
        """Check the types and sizes.

        Raises:
          PluginError: the kernel does not support them.
        """
        if self.bits not in BITS:
            raise PluginError(f"bits is {self.bits}: the Triton kernel knows 2, 3, 4, 6 and 8")
        if self.group_size < 16 or self.group_size % 16:
            raise PluginError(
                f"block_size is {self.group_size}: the Triton kernel takes multiples of 16"
            )
        if self.dtype not in ("float16", "bfloat16"):
            raise PluginError(
                f"activations are {self.dtype}: the Triton kernel takes float16 or bfloat16"
            )

    @property
    def code_dtype(self) -> Literal["uint8", "uint32"]:
        """Element type of the pointer to ``codes``.

        Runs of three words hold 32 codes of 3 bits or 16 of 6; groups of whole runs are read so.
        """
        run = {3: 32, 6: 16}.get(self.bits)
        return "uint32" if run is not None and self.group_size % run == 0 else "uint8"

    @property
    def arguments(self) -> tuple[tuple[str, str], ...]:
        """Names and types of the arguments of a launch, in order: inputs, integers, the output.

        The type of a pointer is that of its elements. The integers ``M``, ``N``, ``K``, ``R`` and
        ``splits`` are passed in every form, as ``int32``.
        """
        one, two = self.low_rank == "one_launch", self.low_rank == "two_launches"
        operands = (
            ("x", self.dtype, True),
            ("codes", self.code_dtype, True),
            ("scales", self.scale_dtype, True),
            ("zero_points", "uint8", self.zero_points),
            ("bias", self.dtype, self.bias),
            ("lora_a", self.factor_dtype, one),
            ("down", self.down_dtype, two),
            ("lora_b", self.factor_dtype, one or two),
        )
        inputs = tuple((name, dtype) for name, dtype, present in operands if present)
        integers = tuple((name, "int32") for name in ("M", "N", "K", "R", "splits"))
        return (*inputs, *integers, ("y", self.dtype))


def down_arguments(dtype: Dtype, factor_dtype: Dtype) -> tuple[tuple[str, str], ...]:
    """Arguments of :func:`~eoracc.plugins.triton.kernel.low_rank_down`, in order."""
    integers = tuple((name, "int32") for name in ("M", "K", "R", "span"))
    return (("x", dtype), ("lora_a", factor_dtype), *integers, ("down", "float32"))


@dataclass(frozen=True, kw_only=True)
class DownTactic:
    """Tiling of the first of two launches: ``down = X lora_a^T`` in parts along K."""

    block_m: int
    block_r: int
    block_k: int
    span: int
    """Columns of K in a part, a multiple of ``block_k``; there are ``ceil(K / span)`` parts."""
    num_warps: int
    num_stages: int

    def splits(self, columns: int) -> int:
        """Number of parts for K ``columns``, the first axis of ``down float32 [splits, M, R]``."""
        return -(-columns // self.span)

    def grid(self, rows: int, rank: int, columns: int) -> tuple[int, int, int]:
        """``(ceil(M / block_m), ceil(R / block_r), ceil(K / span))``, in programs."""
        return -(-rows // self.block_m), -(-rank // self.block_r), self.splits(columns)


@dataclass(frozen=True, kw_only=True)
class Tactic:
    """Tiling of the fused kernel, and with ``down`` of the launch before it.

    ``block_r`` is the step along R; in one launch it covers the whole rank.
    """

    block_m: int
    block_n: int
    block_k: int
    block_r: int
    num_warps: int
    num_stages: int
    down: DownTactic | None = None

    @property
    def name(self) -> str:
        """Short and unique among the tactics of a variant."""
        tiles = f"m{self.block_m}_n{self.block_n}_k{self.block_k}_r{self.block_r}"
        launches = "" if self.down is None else "_down"
        return f"{tiles}_w{self.num_warps}_s{self.num_stages}{launches}"

    def grid(self, rows: int, out_features: int) -> tuple[int, int, int]:
        """``(ceil(M / block_m), ceil(N / block_n), 1)``, in programs."""
        return -(-rows // self.block_m), -(-out_features // self.block_n), 1


def tactics(
    bits: int, group_size: int, rows: int, capability: int, *, rank: int = 0
) -> list[Tactic]:
    """Tilings worth timing, the most promising first.

    Args:
      bits: code width of the weight.
      group_size: columns per scale, a multiple of 16.
      rows: M, the largest of the range to tile for.
      capability: that of the GPU, as in :data:`CAPABILITIES`.
      rank: R, the largest to be run, a multiple of 16 up to 256; 0 for no low-rank term.

    Returns:
      Tilings of one launch (``down`` is None) and, with a rank, also of two. Each needs at most
      :data:`SHARED_BYTES` of shared memory.

    Raises:
      PluginError: no kernel supports these.
    """
    Variant(bits=bits, group_size=group_size)
    if not 0 <= rank <= LARGEST_RANK or rank % 16:
        raise PluginError(f"rank is {rank}: the Triton kernel takes multiples of 16 up to 256")
    fused = [
        _fitted(tactic, bits, group_size, rank)
        for tactic in _one_launch_tilings(rows, _ceil2(rank) if rank else 0, capability)
    ]
    if rank == 0:
        return fused
    two = [
        replace(
            _fitted(tactic, bits, group_size, 0),
            block_r=min(_ceil2(rank), 64),
            down=_down_tactic(rows, rank),
        )
        for tactic in _tilings(rows, capability)
    ]
    return [*fused, *two] if rows <= FEW_ROWS and rank <= FEW_RANKS else [*two, *fused]


def _tilings(rows: int, capability: int) -> list[Tactic]:
    """Few rows get many programs of few outputs, more rows larger tiles that share their loads."""
    if rows <= FEW_ROWS:
        block_m = 8 if rows <= 8 else 16
        return [
            _tactic(block_m, 32, 128, num_warps=4, num_stages=4),
            _tactic(block_m, 16, 128, num_warps=2, num_stages=4),
            _tactic(block_m, 64, 64, num_warps=4, num_stages=4),
        ]
    if rows <= 64:
        block_m = 32 if rows <= 32 else 64
        return [
            _tactic(block_m, 64, 64, num_warps=block_m // 8, num_stages=3),
            _tactic(block_m, 128, 32 if block_m == 64 else 64, num_warps=8, num_stages=3),
        ]
    if capability in _WARP_GROUP_PRODUCTS:
        return [
            _tactic(128, 128, 64, num_warps=8, num_stages=2),
            _tactic(64, 128, 64, num_warps=8, num_stages=3),
        ]
    return [
        _tactic(64, 128, 32, num_warps=8, num_stages=4),
        _tactic(128, 64, 32, num_warps=8, num_stages=3),
    ]


def _one_launch_tilings(rows: int, block_r: int, capability: int) -> list[Tactic]:
    """As :func:`_tilings` with few rows, otherwise tiles that leave registers for the rank."""
    if rows <= FEW_ROWS or block_r == 0:
        return [replace(tactic, block_r=max(block_r, 16)) for tactic in _tilings(rows, capability)]
    candidates = [
        _tactic(64, 128, 32, num_warps=8, num_stages=3),
        _tactic(64, 64, 32, num_warps=8, num_stages=3),
        _tactic(32, 128, 64, num_warps=8, num_stages=3),
        _tactic(32, 64, 64, num_warps=4, num_stages=3),
        _tactic(16, 64, 64, num_warps=4, num_stages=3),
    ]
    fitting = [
        replace(tactic, block_r=block_r)
        for tactic in candidates
        if tactic.block_m <= max(32, rows)
        and tactic.block_m * block_r <= _DOWN_VALUES
        # Both operands of the up-projection pass through shared memory.
        and 2 * block_r * (tactic.block_m + tactic.block_n) <= SHARED_BYTES
    ]
    return fitting[:2]


def _tactic(block_m: int, block_n: int, block_k: int, *, num_warps: int, num_stages: int) -> Tactic:
    return Tactic(
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        block_r=16,
        num_warps=num_warps,
        num_stages=num_stages,
    )


def _fitted(tactic: Tactic, bits: int, group_size: int, rank: int) -> Tactic:
    """``tactic`` with steps along K that fit the groups, and as many stages as memory holds."""
    block_k, stages = _block_k(group_size, tactic.block_k), tactic.num_stages
    # Bytes of one column: X and the codes, in one launch also lora_a and X once more.
    column = 2 * tactic.block_m + tactic.block_n * bits // 8
    if rank:
        column += 2 * tactic.block_m + 2 * tactic.block_r
    while stages * block_k * column > SHARED_BYTES and stages > 2:
        stages -= 1
    while stages * block_k * column > SHARED_BYTES and block_k > 32:
        block_k = _block_k(group_size, block_k // 2)
    return replace(tactic, block_k=block_k, num_stages=stages)


def _down_tactic(rows: int, rank: int) -> DownTactic:
    """Few rows are split along K into many programs; many rows are enough programs already."""
    few = rows <= FEW_ROWS
    return DownTactic(
        block_m=16 if few else 32,
        block_r=16 if few else min(_ceil2(rank), 64),
        block_k=128 if few else 64,
        span=512 if few else 2048,
        num_warps=4,
        num_stages=3,
    )


def _block_k(group_size: int, wanted: int) -> int:
    """A step along K of up to ``wanted`` columns: part of one group, or several whole groups.

    A step within a group rounds nothing. If that means steps below 64, speed takes precedence.
    """
    within = min(wanted, group_size & -group_size)
    return wanted if within < 64 and wanted % group_size == 0 else within


def _ceil2(value: int) -> int:
    """The power of two at or above ``value``."""
    return 1 << (value - 1).bit_length()
