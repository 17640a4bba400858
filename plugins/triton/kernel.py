"""The fused op for GPUs in Triton: ``Y = X dequant(B)^T + (X lora_a^T) lora_b^T + bias``.

Operands are those of ``eoracc::MatMulNBitsLowRank`` in the plain layout; X, lora_a and lora_b are
float16 or bfloat16. There are two ways to compute the low-rank term:

- **One launch**, for few rows: :func:`matmul_nbits_low_rank` with ``lora_a``. Every program also
  multiplies X with all of lora_a, on tiles of X that it has loaded anyway, and projects the result
  up. lora_a comes from memory once and then from the L2 cache.
- **Two launches**: :func:`low_rank_down` writes ``X lora_a^T`` in parts, one for each run of
  columns, so that few rows still fill the GPU; :func:`matmul_nbits_low_rank` with ``down`` sums
  the parts in order and projects the sum up.

A program owns ``BLOCK_N`` outputs of ``BLOCK_M`` rows and goes along K alone: there are no atomics
and no sums in memory, so the same tactic gives the same bits on every run.

The weight is the left operand of the tensor cores' product, ``Y^T = W X^T``: a few rows fill its
narrow side, and an operand made in registers stays there. Its elements are the integers
``code - zero_point``, exact in either type, and each group's sum is scaled in float32. Only if a
step along K spans several groups, the scale is multiplied into the weight, which rounds it.

Parameters have the order of TensorRT's ahead-of-time plugins: inputs, integers, outputs.
"""

# Triton gives parameters their types when it compiles for them.
# ruff: noqa: ANN001, ANN201, ANN202
# mypy: ignore-errors

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["low_rank_down", "matmul_nbits_low_rank"]


@triton.jit
def matmul_nbits_low_rank(
    x_ptr,  # [M, K]
    codes_ptr,  # uint8 [N, G, GROUP * BITS / 8]; at 3 and 6 bits read as words of 32 or 8 bits
    scales_ptr,  # [N, G]
    zero_points_ptr,  # uint8 [N, G], codes; None for 2^(BITS - 1)
    bias_ptr,  # [N] or None
    lora_a_ptr,  # [R, K]; None for two launches and for no low-rank term
    down_ptr,  # float32 [splits, M, R]; None for one launch and for no low-rank term
    lora_b_ptr,  # [N, R]; None for no low-rank term
    M,
    N,
    K,
    R,
    splits,
    y_ptr,  # [M, N]
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program ``(i, j)`` writes the rows of block i and the outputs of block j."""
    groups = tl.cdiv(K, GROUP)
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_n = tl.program_id(1).to(tl.int64) * BLOCK_N
    # Past the edges the last row is read again, which needs no mask, and not written.
    m = tl.minimum(tl.arange(0, BLOCK_M), (M - 1 - first_m).to(tl.int32))
    n = tl.minimum(tl.arange(0, BLOCK_N), (N - 1 - first_n).to(tl.int32))
    k = tl.arange(0, BLOCK_K)
    r = tl.arange(0, BLOCK_R)

    x_ptrs = x_ptr + first_m * K + m[None, :] * K + k[:, None]
    y = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    down = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(0, K, BLOCK_K):
        inside = start + k < K
        x = tl.load(x_ptrs + start, mask=inside[:, None], other=0.0)
        codes = _load_codes(codes_ptr, first_n, n, start, groups, BITS, GROUP, BLOCK_N, BLOCK_K)
        scales = _load_per_group(scales_ptr, first_n, n, start, groups, GROUP, BLOCK_N, BLOCK_K)
        zero_points = None
        if zero_points_ptr is not None:
            zero_points = _load_per_group(
                zero_points_ptr, first_n, n, start, groups, GROUP, BLOCK_N, BLOCK_K
            )
        weight = _subtract_zero_points(codes, zero_points, x.dtype, BITS)
        if BLOCK_K <= GROUP:
            y += tl.dot(weight, x) * scales.to(tl.float32)
        else:
            y = tl.dot((weight * scales.to(tl.float32)).to(x.dtype), x, y)
        if lora_a_ptr is not None:
            lora_a = tl.load(
                lora_a_ptr + r[:, None] * K + (start + k)[None, :],
                mask=(r < R)[:, None] & inside[None, :],
                other=0.0,
            )
            # Loaded again: the two products want the tile in different layouts, and a load that
            # feeds both is not done ahead of time. The hint keeps the loads from being merged.
            x = tl.load(
                x_ptrs + start, mask=inside[:, None], other=0.0, eviction_policy="evict_last"
            )
            down = tl.dot(lora_a.to(x.dtype), x, down)

    if lora_b_ptr is not None:
        lora_b_ptrs = lora_b_ptr + first_n * R + n[:, None] * R + r[None, :]
        if lora_a_ptr is not None:
            lora_b = tl.load(lora_b_ptrs, mask=(r < R)[None, :], other=0.0)
            y = tl.dot(lora_b.to(x_ptr.dtype.element_ty), down.to(x_ptr.dtype.element_ty), y)
        else:
            for start in range(0, R, BLOCK_R):
                inside = start + r < R
                down = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
                for split in range(splits):
                    part = (split * M + first_m) * R
                    down += tl.load(
                        down_ptr + part + m[None, :] * R + (start + r)[:, None],
                        mask=inside[:, None],
                        other=0.0,
                    )
                lora_b = tl.load(lora_b_ptrs + start, mask=inside[None, :], other=0.0)
                y = tl.dot(lora_b.to(x_ptr.dtype.element_ty), down.to(x_ptr.dtype.element_ty), y)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + first_n + n)[:, None].to(tl.float32)

    m = tl.arange(0, BLOCK_M)
    n = tl.arange(0, BLOCK_N)
    tl.store(
        y_ptr + first_m * N + first_n + m[:, None] * N + n[None, :],
        tl.trans(y).to(y_ptr.dtype.element_ty),
        mask=(first_m + m < M)[:, None] & (first_n + n < N)[None, :],
    )


@triton.jit
def low_rank_down(
    x_ptr,  # [M, K]
    lora_a_ptr,  # [R, K]
    M,
    K,
    R,
    span,  # columns that a program sums over, a multiple of BLOCK_K
    down_ptr,  # float32 [ceil(K / span), M, R]
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Program ``(i, j, s)`` writes the rows of block i and the ranks of block j of part s."""
    first_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    first_r = tl.program_id(1) * BLOCK_R
    first_k = tl.program_id(2) * span
    m = tl.minimum(tl.arange(0, BLOCK_M), (M - 1 - first_m).to(tl.int32))
    r = tl.minimum(first_r + tl.arange(0, BLOCK_R), R - 1)
    k = tl.arange(0, BLOCK_K)

    down = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
    for start in range(first_k, tl.minimum(first_k + span, K), BLOCK_K):
        columns = start + k
        inside = columns < K
        x = tl.load(
            x_ptr + first_m * K + m[None, :] * K + columns[:, None],
            mask=inside[:, None],
            other=0.0,
        )
        lora_a = tl.load(
            lora_a_ptr + r[:, None] * K + columns[None, :], mask=inside[None, :], other=0.0
        )
        down = tl.dot(lora_a.to(x.dtype), x, down)

    m = tl.arange(0, BLOCK_M)
    r = first_r + tl.arange(0, BLOCK_R)
    part = (tl.program_id(2).to(tl.int64) * M + first_m) * R
    tl.store(
        down_ptr + part + m[:, None] * R + r[None, :],
        tl.trans(down),
        mask=(first_m + m < M)[:, None] & (r < R)[None, :],
    )


@triton.jit
def _load_codes(
    codes_ptr,
    first_n,
    n,
    start,
    groups,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Codes of rows ``first_n + n`` and columns ``start + [0, BLOCK_K)``: ``[BLOCK_N, BLOCK_K]``.

    A row is one stream of bits, and it ends with its last group.
    """
    # What is read at a time: UNITS units of a stream, which hold CODES codes. At 3 and 6 bits they
    # take three units; units of 32 bits are what asynchronous copies take.
    UNIT: tl.constexpr = codes_ptr.dtype.element_ty.primitive_bitwidth
    UNITS: tl.constexpr = 3 if BITS % 3 == 0 else 1
    CODES: tl.constexpr = UNITS * UNIT // BITS
    RUNS: tl.constexpr = BLOCK_K // CODES
    runs = groups * (GROUP // CODES) if GROUP % CODES == 0 else groups * GROUP // CODES
    row_ptrs = codes_ptr + first_n * (runs * UNITS) + n[:, None] * (runs * UNITS)
    run = start // CODES + tl.arange(0, RUNS)[None, :]
    ptrs = row_ptrs + run * UNITS
    # Within a group no step goes past the end of the row.
    inside = run < runs if BLOCK_K > GROUP else None
    unit = tl.load(ptrs, mask=inside)
    if UNITS == 3:
        second = tl.load(ptrs + 1, mask=inside)
        third = tl.load(ptrs + 2, mask=inside)
        if UNIT == 8:
            unit = unit.to(tl.uint32) | second.to(tl.uint32) << 8 | third.to(tl.uint32) << 16
        else:
            # Three words of 32 bits are four of 24, each of whole codes.
            even = tl.join(unit, second >> 16 | third << 16)
            odd = tl.join(unit >> 24 | second << 8, third >> 8)
            unit = tl.join(even, odd).reshape(BLOCK_N, 4 * RUNS) & 0xFFFFFF
    # A word of n codes is two of n / 2, the low one first.
    HALVINGS: tl.constexpr = (UNITS * 8 // BITS).bit_length() - 1
    WORDS: tl.constexpr = BLOCK_K >> HALVINGS
    for level in tl.static_range(HALVINGS):
        half = BITS << (HALVINGS - 1 - level)
        unit = tl.join(unit & ((1 << half) - 1), unit >> half)
        unit = unit.reshape(BLOCK_N, WORDS << (level + 1))
    return unit


@triton.jit
def _load_per_group(
    ptr,
    first_n,
    n,
    start,
    groups,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The values of ``[N, groups]`` for a step, ``[BLOCK_N, 1]`` or ``[BLOCK_N, BLOCK_K]``."""
    ptrs = ptr + first_n * groups + n[:, None] * groups + start // GROUP
    if BLOCK_K <= GROUP:
        values = tl.load(ptrs)
    else:
        COUNT: tl.constexpr = BLOCK_K // GROUP
        group = tl.arange(0, COUNT)[None, :]
        values = tl.load(ptrs + group, mask=start // GROUP + group < groups, other=0)
        values = tl.broadcast_to(values[:, :, None], (BLOCK_N, COUNT, GROUP))
        values = values.reshape(BLOCK_N, BLOCK_K)
    return values


@triton.jit
def _subtract_zero_points(codes, zero_points, dtype: tl.constexpr, BITS: tl.constexpr):
    """``code - zero_point``, exact in ``dtype``.

    A code in the low bits of a mantissa is that code plus a power of two, without a conversion,
    which the GPU does at a quarter of the rate or less. bfloat16 has 7 such bits.
    """
    if dtype == tl.bfloat16 and BITS == 8:
        if zero_points is None:
            steps = codes.to(tl.int32) - 128
        else:
            steps = codes.to(tl.int32) - zero_points.to(tl.int32)
        weight = steps.to(tl.float32).to(tl.bfloat16)
    else:
        POWER: tl.constexpr = 1024 if dtype == tl.float16 else 128
        PATTERN: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
        raised = (codes.to(tl.uint16) | PATTERN).to(dtype, bitcast=True)
        if zero_points is None:
            offset = tl.full((1, 1), POWER + (1 << (BITS - 1)), tl.float32)
        else:
            offset = zero_points.to(tl.float32) + POWER
        weight = raised - offset.to(dtype)
    return weight
