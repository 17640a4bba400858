"""The fused Triton kernel as an operator of PyTorch, for eager models on NVIDIA GPUs.

``torch.ops.eoracc.matmul_nbits_low_rank`` exists once this module is imported. Its fake kernel lets
``torch.compile`` and ``torch.export`` trace it without a GPU; it has no gradient.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from eoracc.errors import PluginError
from eoracc.plugins.triton.tactics import Variant, tactics

__all__ = ["matmul_nbits_low_rank"]

_DTYPES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
_INTERPRETED_CAPABILITY = 80
"""The GPU whose tactics Triton's interpreter uses."""


@torch.library.custom_op("eoracc::matmul_nbits_low_rank", mutates_args=())
def matmul_nbits_low_rank(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bits: int,
    block_size: int,
) -> torch.Tensor:
    """``x @ dequant(codes).T + (x @ lora_a.T) @ lora_b.T + bias``, operands as in docs/op.md.

    Args:
      x: float16 or bfloat16 ``[..., K]``.
      codes: uint8 ``[N, ceil(K / block_size), block_size * bits / 8]``.
      scales: float ``[N, ceil(K / block_size)]``.
      zero_points: uint8 ``[N, ceil(K / block_size)]``; None for ``2**(bits - 1)``.
      bias: as x, ``[N]``, or None.
      lora_a: float ``[R, K]``, R a multiple of 16 up to 256, or None.
      lora_b: float ``[N, R]``, None with ``lora_a``.
      bits: 2, 3, 4, 6 or 8.
      block_size: columns of a scale, a multiple of 16.

    Returns:
      as x, ``[..., N]``.

    Raises:
      PluginError: an operand does not fit, Triton is missing, or x is on no NVIDIA GPU. On the CPU
        the kernel runs in Triton's interpreter only (``TRITON_INTERPRET=1``).
    """
    _check(x, codes, scales, zero_points, bias, lora_a, lora_b, bits, block_size)
    try:
        import triton  # noqa: PLC0415 - an extra

        from eoracc.plugins.triton import kernel  # noqa: PLC0415
    except ImportError as error:
        raise PluginError(
            f"eoracc::matmul_nbits_low_rank runs with Triton, which is missing ({error}): "
            "run pip install 'eoracc[triton]'"
        ) from error
    interpreted = bool(triton.knobs.runtime.interpret)
    if not (x.is_cuda or interpreted):
        raise PluginError(
            f"eoracc::matmul_nbits_low_rank: x is on {x.device}, and the kernel runs on NVIDIA "
            "GPUs: move the operands to one"
        )
    in_features, out_features = x.shape[-1], codes.shape[0]
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = x.numel() // in_features
    if y.numel() == 0:
        return y
    rank = 0 if lora_a is None else lora_a.shape[0]
    capability = _INTERPRETED_CAPABILITY
    if x.is_cuda:
        major, minor = torch.cuda.get_device_capability(x.device)
        capability = 10 * major + minor
    (tactic, *_) = tactics(bits, block_size, rows, capability, rank=rank)
    x = x.contiguous()
    codes = codes.contiguous()
    if Variant(bits=bits, group_size=block_size).code_dtype == "uint32":
        codes = codes.view(torch.uint32)
    lora_a = None if rank == 0 else _contiguous(lora_a)
    lora_b = None if rank == 0 else _contiguous(lora_b)
    down, splits = None, 0
    # A launch uses the current device, which may not be the device of x.
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        if tactic.down is not None:
            splits = tactic.down.splits(in_features)
            down = x.new_empty((splits, rows, rank), dtype=torch.float32)
            kernel.low_rank_down[tactic.down.grid(rows, rank, in_features)](
                x,
                lora_a,
                rows,
                in_features,
                rank,
                tactic.down.span,
                down,
                BLOCK_M=tactic.down.block_m,
                BLOCK_K=tactic.down.block_k,
                BLOCK_R=tactic.down.block_r,
                **_options(tactic.down.num_warps, tactic.down.num_stages),
            )
            lora_a = None
        kernel.matmul_nbits_low_rank[tactic.grid(rows, out_features)](
            x,
            codes,
            scales.contiguous(),
            _contiguous(zero_points),
            _contiguous(bias),
            lora_a,
            down,
            lora_b,
            rows,
            out_features,
            in_features,
            rank,
            splits,
            y,
            BITS=bits,
            GROUP=block_size,
            BLOCK_M=tactic.block_m,
            BLOCK_N=tactic.block_n,
            BLOCK_K=tactic.block_k,
            BLOCK_R=tactic.block_r,
            **_options(tactic.num_warps, tactic.num_stages),
        )
    return y


@matmul_nbits_low_rank.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bits: int,
    block_size: int,
) -> torch.Tensor:
    _check(x, codes, scales, zero_points, bias, lora_a, lora_b, bits, block_size)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


def _check(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zero_points: torch.Tensor | None,
    bias: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bits: int,
    block_size: int,
) -> None:
    """Check shapes and types, so that the kernel never reads past the end of an operand."""
    if x.dtype not in _DTYPES or x.dim() == 0:
        raise _misfit("x", x, "float16 or bfloat16 [..., K]")
    Variant(bits=bits, group_size=block_size)
    out_features, groups = codes.shape[0], -(-x.shape[-1] // block_size)
    rank = 0 if lora_a is None else lora_a.shape[0]
    if (lora_a is None) != (lora_b is None):
        raise PluginError("eoracc::matmul_nbits_low_rank: lora_a and lora_b go together")
    floats = (torch.float16, torch.bfloat16, torch.float32)
    operands: tuple[tuple[str, torch.Tensor | None, tuple[Any, ...], tuple[Any, ...]], ...] = (
        ("codes", codes, (torch.uint8,), (out_features, groups, block_size * bits // 8)),
        ("scales", scales, floats, (out_features, groups)),
        ("zero_points", zero_points, (torch.uint8,), (out_features, groups)),
        ("bias", bias, (x.dtype,), (out_features,)),
        ("lora_a", lora_a, floats, (rank, x.shape[-1])),
        ("lora_b", lora_b, floats, (out_features, rank)),
    )
    for name, operand, dtypes, shape in operands:
        if operand is None:
            continue
        if operand.dtype not in dtypes or tuple(operand.shape) != shape:
            types = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise _misfit(name, operand, f"{types} {list(shape)}")
        if operand.device != x.device:
            raise PluginError(
                f"eoracc::matmul_nbits_low_rank: {name} is on {operand.device}, x on {x.device}: "
                "move them to one device"
            )
    if rank % 16 or rank > 256:
        raise PluginError(
            f"eoracc::matmul_nbits_low_rank: the rank is {rank}: the kernel takes multiples of 16 "
            "up to 256, so fill the factors up with zeros"
        )


def _misfit(name: str, operand: torch.Tensor, wanted: str) -> PluginError:
    given = f"{str(operand.dtype).removeprefix('torch.')} {list(operand.shape)}"
    return PluginError(f"eoracc::matmul_nbits_low_rank: {name} is {given} where {wanted} fits")


def _contiguous(operand: torch.Tensor | None) -> torch.Tensor | None:
    return None if operand is None else operand.contiguous()


def _options(num_warps: int, num_stages: int) -> dict[str, int]:
    return {"num_warps": num_warps, "num_stages": num_stages}
