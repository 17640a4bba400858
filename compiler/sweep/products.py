"""The forward pass's own arithmetic: products and attention, in float32 or in bfloat16.

Calibration is a forward pass over tens of thousands of tokens. Its statistics hardly change if
operands are rounded to eight bits of mantissa (docs/adr/0005), and a processor with AMX multiplies
bfloat16 several times as fast as float32. Sums are float32 either way. Scores are computed in
float32, and no weight of an artifact is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray

from eoracc.passes.calibrate import AskedPrecision, Precision
from eoracc.passes.solvers.gram import GramProducts

__all__ = [
    "add_cross_products",
    "add_outer_products",
    "attention",
    "bfloat16_is_fast",
    "gram_products",
    "linear_products",
    "resolve_precision",
]

Float = NDArray[np.float32]

_STRIPS = 3
"""Strips of a symmetric product; the part right of a strip's diagonal block is not computed."""


def bfloat16_is_fast() -> bool:
    """Whether this processor has units (AMX) that multiply bfloat16."""
    # torch has no public name for it.
    return bool(torch.cpu._is_amx_tile_supported())


def resolve_precision(asked: AskedPrecision) -> Precision:
    """The precision that an option asks for; ``auto`` depends on this processor."""
    if asked == "auto":
        return "bfloat16" if bfloat16_is_fast() else "float32"
    return asked


def gram_products(precision: Precision) -> GramProducts | None:
    """How Grams are summed in ``precision``; None for NumPy's float32."""
    if precision == "float32":
        return None
    return GramProducts(add_outer_products, add_cross_products)


def linear_products(
    weights: Sequence[Float], precision: Precision
) -> Callable[[Float], list[Float]]:
    """A function that multiplies inputs ``float32 [tokens, K]`` with each of ``weights [N, K]``.

    In bfloat16, inputs, weights and outputs are rounded (relative error ``2**-8`` at most).
    """
    dtype = _dtype(precision)
    held = [torch.from_numpy(weight).to(dtype) for weight in weights]

    def multiply(inputs: Float) -> list[Float]:
        x = torch.from_numpy(inputs).to(dtype)
        return [torch.nn.functional.linear(x, weight).float().numpy() for weight in held]

    return multiply


def attention(
    query: Float,
    key: Float,
    value: Float,
    mask: NDArray[np.generic] | None,
    *,
    heads: int,
    kv_heads: int,
    causal: bool,
    scale: float | None,
    precision: Precision,
) -> Float:
    """Grouped-query attention without a past, as ONNX's ``Attention`` defines it.

    Args:
      query: ``float32 [batch, sequence, heads * size]``.
      key: ``float32 [batch, sequence, kv_heads * size]``.
      value: likewise.
      mask: the positions that a query attends to, bool, or an addend of its scores, float;
      broadcasts to
        ``[batch, heads, sequence, sequence]``.
      heads: of the query.
      kv_heads: of key and value.
      causal: a query attends to no later position, whatever ``mask`` is.
      scale: of the scores; None for one over the root of ``size``.
      precision: of the products.

    Returns:
      ``float32 [batch, sequence, heads * size]``.
    """
    dtype = _dtype(precision)
    q, k, v = (
        torch.from_numpy(array).to(dtype).reshape(*array.shape[:2], count, -1).transpose(1, 2)
        for array, count in ((query, heads), (key, kv_heads), (value, kv_heads))
    )
    allowed = None if mask is None else torch.from_numpy(mask)
    if allowed is not None and allowed.dtype == torch.bool and bool(allowed.all()):
        allowed = None
    if allowed is not None and causal:
        length = q.shape[2]
        earlier = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = (
            allowed & earlier
            if allowed.dtype == torch.bool
            else allowed.masked_fill(~earlier, -torch.inf)
        )
    if allowed is not None and allowed.dtype != torch.bool:
        allowed = allowed.to(dtype)
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=allowed,
        is_causal=causal and allowed is None,
        scale=scale,
        enable_gqa=heads != kv_heads,
    )
    return mixed.transpose(1, 2).flatten(2).float().numpy()


def add_outer_products(rows: Float, total: Float) -> None:
    """Add ``rows.T @ rows``, operands rounded to bfloat16, to the lower triangle of ``total``.

    Args:
      rows: ``float32 [tokens, K]``.
      total: ``float32 [K, K]``; the part above its diagonal is undefined afterwards.
    """
    x, out = _rounded(rows), torch.from_numpy(total)
    width = -(-x.shape[1] // _STRIPS)
    with _bfloat16_operands():
        for start in range(0, x.shape[1], width):
            stop = min(start + width, x.shape[1])
            strip = out[start:stop, :stop]
            torch.addmm(strip, x[:, start:stop].T, x[:, :stop], out=strip)


def add_cross_products(left: Float, right: Float, total: Float) -> None:
    """Add ``left.T @ right``, operands rounded to bfloat16, to ``total``.

    Args:
      left: ``float32 [tokens, M]``.
      right: ``float32 [tokens, K]``.
      total: ``float32 [M, K]``.
    """
    out = torch.from_numpy(total)
    with _bfloat16_operands():
        torch.addmm(out, _rounded(left).T, _rounded(right), out=out)


def _dtype(precision: Precision) -> torch.dtype:
    return torch.bfloat16 if precision == "bfloat16" else torch.float32


def _rounded(rows: Float) -> torch.Tensor:
    """``rows`` rounded to bfloat16, in float32: the same operands on every processor."""
    return torch.from_numpy(rows).to(torch.bfloat16).to(torch.float32)


@contextmanager
def _bfloat16_operands() -> Iterator[None]:
    """Let products of float32 matrices use the processor's bfloat16 units, where it has any.

    PyTorch has no other way to a float32 product of bfloat16 matrices on the CPU. Without AMX the
    setting changes nothing, so the operands are rounded beforehand (:func:`_rounded`).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
