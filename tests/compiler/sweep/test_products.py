from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from eoracc.compiler.sweep.products import (
    add_cross_products,
    add_outer_products,
    attention,
    linear_products,
)
from eoracc.passes.calibrate import Precision

UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}

Float = NDArray[np.float32]


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_linears_share_their_inputs(precision: Precision) -> None:
    inputs = rng().standard_normal((7, 33), np.float32)
    weights = [rng().standard_normal((rows, 33), np.float32) for rows in (5, 1, 12)]
    products = linear_products(weights, precision)(inputs)
    for weight, product in zip(weights, products, strict=True):
        exact = inputs.astype(np.float64) @ weight.T
        # Both operands and the output are rounded, sums of 33 are float32.
        magnitude = np.abs(inputs).astype(np.float64) @ np.abs(weight).T
        limit = (3.1 * UNIT[precision] + 33 * UNIT["float32"]) * magnitude
        assert product.dtype == np.float32
        assert np.all(np.abs(product - exact) <= limit)
        assert limit.max() < 0.1 * exact.std()


@pytest.mark.parametrize("rows", [1, 64, 300])
@pytest.mark.parametrize("width", [1, 2, 64, 100])
def test_outer_products_are_exact_but_for_their_operands_rounding(rows: int, width: int) -> None:
    inputs = rng().standard_normal((rows, width), np.float32)
    total = np.tril(np.ones((width, width), np.float32))
    add_outer_products(inputs, total)
    exact = inputs.T.astype(np.float64) @ inputs + 1
    magnitude = np.abs(inputs.T).astype(np.float64) @ np.abs(inputs) + 1
    limit = (2.1 * UNIT["bfloat16"] + (rows + 1) * UNIT["float32"]) * magnitude
    assert np.all(np.abs(np.tril(total - exact)) <= limit)
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("rows", [1, 64, 300])
@pytest.mark.parametrize("width", [1, 2, 64, 100])
def test_cross_products_are_exact_but_for_their_operands_rounding(rows: int, width: int) -> None:
    left, right = rng().standard_normal((2, rows, width), np.float32)
    total = np.ones((width, width), np.float32)
    add_cross_products(left, right, total)
    exact = left.T.astype(np.float64) @ right + 1
    magnitude = np.abs(left.T).astype(np.float64) @ np.abs(right) + 1
    limit = (2.1 * UNIT["bfloat16"] + (rows + 1) * UNIT["float32"]) * magnitude
    assert np.all(np.abs(total - exact) <= limit)
    # An output that is rounded to bfloat16, or a left and right that are swapped, is seen.
    assert width == 1 or np.abs(exact - exact.T).max() > 10 * limit.max()
    assert torch.get_float32_matmul_precision() == "highest"


def bfloat16(values: Float) -> NDArray[np.float64]:
    """``values`` rounded to bfloat16, ties to even, by integer arithmetic on their bits."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & np.uint32(1))) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32).astype(np.float64)


def test_products_are_of_bfloat16_operands_on_every_processor() -> None:
    left, right = rng().standard_normal((2, 64, 32), np.float32)
    outer, cross = np.zeros((2, 32, 32), np.float32)
    add_outer_products(left, outer)
    add_cross_products(left, right, cross)
    for found, a, b in ((np.tril(outer), left, left), (cross, left, right)):
        exact = bfloat16(a).T @ bfloat16(b)
        # Products of bfloat16 are exact in float32; only sums of 64 round.
        limit = 64 * UNIT["float32"] * (np.abs(bfloat16(a)).T @ np.abs(bfloat16(b)))
        seen = np.tril(np.ones_like(exact)) if found is not cross else 1
        assert np.all(np.abs(found - exact * seen) <= limit)
        unrounded = a.T.astype(np.float64) @ b
        assert np.abs((unrounded - exact) * seen).max() > 10 * limit.max()


def oracle(q: Float, k: Float, v: Float, seen: NDArray[np.bool_], heads: int, kv: int) -> Float:
    batch, length, _ = q.shape
    query, keys, values = (
        a.astype(np.float64).reshape(batch, length, n, -1).transpose(0, 2, 1, 3)
        for a, n in ((q, heads), (k, kv), (v, kv))
    )
    keys, values = (np.repeat(a, heads // kv, axis=1) for a in (keys, values))
    scores = np.where(seen, query @ keys.transpose(0, 1, 3, 2) * 0.3, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    mixed: Float = (weights @ values).astype(np.float32)
    return mixed.transpose(0, 2, 1, 3).reshape(batch, length, -1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["none", "all", "bool", "float"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention(precision: Precision, mask: str, *, causal: bool) -> None:
    batch, length, heads, kv, size = 2, 9, 6, 2, 8
    q = rng().standard_normal((batch, length, heads * size), np.float32)
    k, v = rng().standard_normal((2, batch, length, kv * size), np.float32)
    seen = np.ones((batch, 1, length, length), bool)
    if mask in ("bool", "float"):
        seen[1, :, :, 6:] = False
    given = {"none": None, "float": np.where(seen, 0, -np.inf).astype(np.float32)}.get(mask, seen)
    found = attention(
        q, k, v, given, heads=heads, kv_heads=kv, causal=causal, scale=0.3, precision=precision
    )
    expected = oracle(q, k, v, seen & np.tri(length, dtype=bool) if causal else seen, heads, kv)
    # A score is off by its products' rounding, a weight by twice that, relative; then the mix.
    score = 0.3 * size * np.abs(q).max() * np.abs(k).max()
    limit = UNIT[precision] * (2 * 2 * score + 3) * np.abs(v).max()
    assert np.abs(found - expected).max() <= limit
    if precision == "float32":
        assert limit < 1e-3 * expected.std()
