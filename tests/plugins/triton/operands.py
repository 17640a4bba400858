"""Random operands of the Triton kernels, what they should give, and how far off that may be."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.plugins.reference import fused_matmul

Float64 = NDArray[np.float64]

ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-24}


def guarded(values: torch.Tensor) -> torch.Tensor:
    """The same between NaNs (or codes of ones), which no read past an end goes unseen with."""
    fill = float("nan") if values.is_floating_point() else torch.iinfo(values.dtype).max
    memory = torch.full((values.numel() + 512,), fill, dtype=values.dtype)
    inside = memory[256 : 256 + values.numel()]
    inside.copy_(values.reshape(-1))
    return inside.view(values.shape)


@dataclass(frozen=True)
class Problem:
    """Operands in ``dtype``, packed as the kernels take them."""

    x: torch.Tensor
    weight: NBitsWeight
    codes: torch.Tensor
    scales: torch.Tensor
    zero_points: torch.Tensor | None
    bias: torch.Tensor | None
    lora_a: torch.Tensor | None
    lora_b: torch.Tensor | None

    @property
    def rank(self) -> int:
        return 0 if self.lora_a is None else len(self.lora_a)

    def expected(self) -> Float64:
        """In float64, of the operands as they are rounded."""
        factors = None
        if self.lora_a is not None and self.lora_b is not None:
            # 16-bit values lose nothing in float32.
            factors = LowRank(
                lora_a=self.lora_a.to(torch.float32).numpy(),
                lora_b=self.lora_b.to(torch.float32).numpy(),
            )
        bias = None if self.bias is None else wide(self.bias)
        return fused_matmul(wide(self.x), self.weight, factors, bias)

    def tolerance(self, *, rounds_weight: bool) -> Float64:
        """How far each output may be off.

        Sums are float32: K + R + groups additions, each off by a roundoff of what was added so far
        at most. Rounded to the type of X are the output, the down-projection and, where a step
        along K holds several groups, the weight. 2 is for products of those.
        """
        unit = ROUNDOFF[self.x.dtype]
        terms = self.x.shape[-1] + self.rank + self.weight.scales.shape[1]
        identity = np.eye(self.x.shape[-1])
        of_weight = np.abs(wide(self.x)) @ np.abs(fused_matmul(identity, self.weight, None))
        magnitudes = of_weight
        bound = unit * np.abs(self.expected())
        if rounds_weight:
            bound += unit * of_weight
        if self.lora_a is not None and self.lora_b is not None:
            lora_a, lora_b = wide(self.lora_a), np.abs(wide(self.lora_b))
            bound += unit * np.abs(wide(self.x) @ lora_a.T) @ lora_b.T
            magnitudes = magnitudes + np.abs(wide(self.x)) @ np.abs(lora_a).T @ lora_b.T
        if self.bias is not None:
            magnitudes = magnitudes + np.abs(wide(self.bias))
        tolerance: Float64 = 2 * (bound + terms * ROUNDOFF[torch.float32] * magnitudes)
        return tolerance


def wide(tensor: torch.Tensor) -> Float64:
    result: Float64 = tensor.to(torch.float64).numpy()
    return result


def problem(
    *,
    bits: int,
    group_size: int,
    shape: tuple[int, int, int],
    rank: int = 0,
    dtype: torch.dtype = torch.float16,
    zero_points: bool = False,
    bias: bool = False,
    seed: int = 0,
) -> Problem:
    """One of ``shape`` (M, N, K)."""
    rng = np.random.default_rng(seed)
    rows, out_features, in_features = shape
    groups = -(-in_features // group_size)

    def normal(*sizes: int, scale: float = 1.0) -> torch.Tensor:
        return guarded(torch.from_numpy(scale * rng.standard_normal(sizes)).to(dtype))

    codes = rng.integers(0, 2**bits, (out_features, in_features), np.uint8)
    zeros = rng.integers(0, 2**bits, (out_features, groups), np.uint8) if zero_points else None
    steps = rng.uniform(0.5, 1.5, (out_features, groups)) / 2 ** (bits - 1)
    scales = guarded(torch.from_numpy(steps).to(dtype))
    # The oracle takes what the type holds, widened: a bfloat16 has no other form in NumPy.
    weight = NBitsWeight.from_codes(
        codes, scales.to(torch.float32).numpy(), zeros, bits=bits, group_size=group_size
    )
    return Problem(
        x=normal(rows, in_features),
        weight=weight,
        codes=guarded(torch.from_numpy(weight.packed)),
        scales=scales,
        zero_points=None if zeros is None else guarded(torch.from_numpy(zeros)),
        bias=normal(out_features) if bias else None,
        lora_a=normal(rank, in_features, scale=in_features**-0.5) if rank else None,
        lora_b=normal(out_features, rank) if rank else None,
    )
