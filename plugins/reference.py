"""The fused op in NumPy and float64, the oracle for every kernel and function."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["activate", "fused_matmul", "rms_norm"]

_Float = NDArray[np.floating[Any]]


def fused_matmul(
    x: _Float,
    weight: NBitsWeight,
    factors: LowRank | None,
    bias: _Float | None = None,
    *,
    norm_weight: _Float | None = None,
    norm_epsilon: float = 0.0,
    parts: Sequence[int] = (),
    activation: str = "",
    residual: _Float | None = None,
    adapters: Sequence[LowRank] = (),
    adapter_scales: Sequence[_Float] | None = None,
    adapter_index: Sequence[int] | NDArray[np.integer[Any]] = (0,),
) -> NDArray[np.float64]:
    """``x @ W.T + (x @ lora_a.T) @ lora_b.T + bias`` and its fusions, operands widened before use.

    Args:
      x: ``[..., K]``.
      weight: ``W``, ``[N, K]``.
      factors: the low-rank term, None for none. With P parts of rank R, ``lora_a [P * R, K]`` holds
        the rows of all parts in order, and ``lora_b`` is ``[N, R]``.
      bias: ``[N]``, None for none.
      norm_weight: ``[K]``, normalises x first (RMS); None for no norm.
      norm_epsilon: added to the mean of squares.
      parts: rows of each merged linear, in order; empty for a single linear.
      activation: "silu" or "gelu_tanh" turns two equal parts into ``activation(first) * second``.
      residual: added last, shaped as the result; None for none.
      adapters: a bank of further low-rank terms, shaped as ``factors``.
      adapter_scales: for each adapter ``[P * R]`` of its own R, multiplies the output of its
        ``lora_a``; None for 1.
      adapter_index: the adapter of each row of the batch, ``[batch]``, or of all, ``[1]``; below 0
        for none. The batch is every dimension of x but the last two, or the rows of a matrix.

    Returns:
      ``float64 [..., N]``, with an activation ``[..., N / 2]``.

    >>> weight = NBitsWeight.from_codes(
    ...     np.array([[3, 1, 2]], np.uint8), np.array([[0.5]], np.float32), None,
    ...     bits=2, group_size=8,
    ... )
    >>> fused_matmul(np.array([1.0, 2.0, 4.0]), weight, None).tolist()
    [-0.5]
    """
    wide: NDArray[np.float64] = x.astype(np.float64)
    if norm_weight is not None:
        wide = rms_norm(wide, norm_weight, norm_epsilon)
    zero_points = weight.zero_points
    if zero_points is None:
        zero_points = np.full(weight.scales.shape, 2 ** (weight.bits - 1), np.uint8)
    steps = weight.codes() - _per_column(zero_points, weight)
    dequantized = steps * _per_column(weight.scales, weight)
    y: NDArray[np.float64] = wide @ dequantized.T
    if factors is not None:
        y = y + _low_rank(wide, factors, parts or (weight.out_features,))
    if adapters:
        scales = adapter_scales or [np.ones(len(adapter.lora_a)) for adapter in adapters]
        terms = [
            _low_rank(wide, adapter, parts or (weight.out_features,), scale.astype(np.float64))
            for adapter, scale in zip(adapters, scales, strict=True)
        ]
        y = y + _chosen(terms, adapter_index)
    if bias is not None:
        y = y + bias
    if activation:
        gate, up = np.split(y, 2, axis=-1)
        y = activate(gate, activation) * up
    return y if residual is None else y + residual


def rms_norm(x: _Float, weight: _Float, epsilon: float) -> NDArray[np.float64]:
    """``x / sqrt(mean(x^2) + epsilon) * weight`` over the last axis, in float64."""
    x = x.astype(np.float64)
    normalised: NDArray[np.float64] = x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon)
    return normalised * weight


def activate(x: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """``silu`` or ``gelu_tanh``, GELU in its tanh approximation, in float64."""
    with np.errstate(over="ignore"):  # exp of a large -x is infinite, and silu there is 0
        if name == "silu":
            result: NDArray[np.float64] = x / (1 + np.exp(-x))
        elif name == "gelu_tanh":
            result = 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
        else:
            raise ValueError(f"{name!r} is no activation: take silu or gelu_tanh")
    return result


def _low_rank(
    x: NDArray[np.float64],
    factors: LowRank,
    parts: Sequence[int],
    scale: NDArray[np.float64] | float = 1.0,
) -> NDArray[np.float64]:
    down, up = (
        factor.astype(np.float64) * (1.0 if scale is None else scale.astype(np.float64)[:, None])
        for factor, scale in (
            (factors.lora_a, factors.lora_a_scale),
            (factors.lora_b, factors.lora_b_scale),
        )
    )
    projected = (x @ down.T) * scale
    rank = len(down) // len(parts)
    edges = np.cumsum([0, *parts])
    outputs = [
        projected[..., part * rank : (part + 1) * rank] @ up[edges[part] : edges[part + 1]].T
        for part in range(len(parts))
    ]
    return np.concatenate(outputs, axis=-1)


def _chosen(
    terms: Sequence[NDArray[np.float64]], index: Sequence[int] | NDArray[np.integer[Any]]
) -> NDArray[np.float64]:
    """For each row of the batch the term that ``index`` picks, or zeros."""
    shape = terms[0].shape
    batch = shape[:1] if len(shape) <= 2 else shape[:-2]
    chosen = np.broadcast_to(np.asarray(index).reshape(-1 if len(index) == 1 else batch), batch)
    result = np.zeros(shape)
    for place in np.ndindex(batch):
        number = int(chosen[place])
        if number >= 0:
            result[place] = terms[number][place]
    return result


def _per_column(per_group: NDArray[Any], weight: NBitsWeight) -> NDArray[np.float64]:
    columns = np.repeat(per_group.astype(np.float64), weight.group_size, axis=1)
    return columns[:, : weight.in_features]
