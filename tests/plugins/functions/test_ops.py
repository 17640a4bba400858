from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.graph.stored import factor_arrays
from eoracc.plugins.op import DENSE_OP
from eoracc.plugins.operands.codes import BITS
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.reference import fused_matmul
from tests.plugins.banks import random_typed_factors
from tests.plugins.fused_op import (
    Float,
    assert_close,
    error_bound,
    fused_model,
    fused_operands,
    one_node_model,
    open_session,
    random_factors,
    random_int8_factors,
    random_weight,
)

SHAPE = (37, 90)


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("rank", [None, 0, 1, 33])
@pytest.mark.parametrize("bits", BITS)
def test_matmul(library: Path | None, bits: int, rank: int | None, zero_points: bool) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, SHAPE, bits=bits, group_size=32, zero_points=zero_points)
    factors = None if rank is None else random_factors(rng, SHAPE, rank=rank)
    bias = rng.standard_normal(37, np.float32)
    session = open_session(fused_model(weight, factors, bias), library)
    for leading in ((0,), (1,), (4,), (2, 9)):
        x = rng.standard_normal((*leading, 90), np.float32)
        (actual,) = session.run(None, {"X": x})
        assert actual.dtype == np.float32
        expected = fused_matmul(x, weight, factors, bias)
        assert_close(actual, expected, error_bound(x, weight, factors, bias))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("stored", [np.float32, np.float16])
def test_mixed_types(
    library: Path | None,
    dtype: Float,
    stored: Float,
) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, SHAPE, bits=3, group_size=32, zero_points=True, scales=stored)
    factors = random_factors(rng, SHAPE, rank=6, dtype=stored)
    bias: NDArray[Any] = rng.standard_normal(37).astype(dtype)
    x: NDArray[Any] = rng.standard_normal((5, 90)).astype(dtype)
    session = open_session(fused_model(weight, factors, bias, dtype=dtype), library)
    (actual,) = session.run(None, {"X": x})
    assert actual.dtype == dtype
    expected = fused_matmul(x, weight, factors, bias)
    assert_close(actual, expected, error_bound(x, weight, factors, bias))


FUSIONS = [
    {},
    {"bias": True},
    {"norm_weight": True, "norm_epsilon": 1e-5},
    {"residual": True, "bias": True},
    {"parts": (48, 16, 32), "norm_weight": True, "norm_epsilon": 1e-5, "bias": True},
    {"parts": (48, 48), "activation": "silu", "norm_weight": True, "residual": True},
    {"parts": (48, 48), "activation": "gelu_tanh"},
]


@pytest.mark.parametrize("factors", [None, "float16", "float32", "int8"])
@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: "-".join(fusion) or "none")
@pytest.mark.parametrize("bits", BITS)
def test_tiles_with_fusions(bits: int, fusion: dict[str, Any], factors: str | None) -> None:
    """The function alone: the kernel has tests of its own."""
    rng = np.random.default_rng(bits)
    parts: tuple[int, ...] = fusion.get("parts", ())
    rows = sum(parts) or 37
    columns, group = (90, 24) if bits != 2 else (70, 72)
    weight = random_weight(rng, (rows, columns), bits=bits, group_size=group, zero_points=bits != 8)
    rank = 16 if parts else 5
    low_rank = _merged_factors(rng, (rows, columns), rank, max(len(parts), 1), factors)
    outputs = rows // 2 if "activation" in fusion else rows
    given = dict(fusion) | {
        name: array
        for name, array in {
            "norm_weight": rng.uniform(0.5, 2, columns).astype(np.float32),
            "residual": rng.standard_normal((3, outputs)).astype(np.float32),
            "bias": rng.standard_normal(rows).astype(np.float32),
        }.items()
        if name in fusion
    }
    session = open_session(fused_model(weight, low_rank, layout=1, **given), None)
    x = rng.standard_normal((3, columns), np.float32)
    (actual,) = session.run(None, {"X": x})
    expected = fused_matmul(x, weight, low_rank, **given)
    bound = error_bound(x, weight, low_rank, **({"bias": None} | given))
    assert_close(actual, expected, bound)


def _merged_factors(
    rng: np.random.Generator, shape: tuple[int, int], rank: int, parts: int, dtype: str | None
) -> LowRank | None:
    """``parts`` down-projections of ``rank`` on top of each other, one up-projection."""
    if dtype is None:
        return None
    if dtype == "int8":
        whole = random_int8_factors(rng, shape, rank=rank * parts)
    else:
        whole = random_factors(
            rng, shape, rank=rank * parts, dtype=np.float16 if dtype == "float16" else np.float32
        )
    return replace(whole, lora_b=whole.lora_b[:, :rank])


def test_tiles_of_float16_activations() -> None:
    rng = np.random.default_rng(8)
    parts = (16, 16)
    weight = random_weight(rng, (32, 90), bits=4, group_size=32, zero_points=False)
    fusions: dict[str, Any] = {
        "parts": parts,
        "activation": "silu",
        "norm_weight": rng.uniform(0.5, 2, 90).astype(np.float32),
        "residual": rng.standard_normal((5, 16)).astype(np.float16),
    }
    x: NDArray[Any] = rng.standard_normal((5, 90)).astype(np.float16)
    model = fused_model(weight, None, dtype=np.float16, layout=1, **fusions)
    (actual,) = open_session(model, None).run(None, {"X": x})
    assert actual.dtype == np.float16
    expected = fused_matmul(x, weight, None, **fusions)
    assert_close(actual, expected, error_bound(x, weight, None, None, **fusions))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("layout", [0, 1])
def test_gather(layout: int, bits: int, zero_points: bool, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    table = random_weight(rng, (50, 90), bits=bits, group_size=32, zero_points=zero_points)
    indices = np.asarray(rng.integers(0, 50, shape), np.int64)
    operands = fused_operands(table, layout=layout)
    model = one_node_model(
        "GatherNBits",
        {name: operands[name] for name in ("B", "scales", "zero_points")},
        {"K": 90, "bits": bits, "block_size": 32, "layout": layout},
        dtype=np.int64,
        output_dtype=np.float32,
    )
    (rows,) = open_session(model, None).run(None, {"X": indices})
    np.testing.assert_array_equal(rows, table.dequantize()[indices])


def test_gather_of_nothing() -> None:
    table = random_weight(
        np.random.default_rng(6), (50, 90), bits=3, group_size=32, zero_points=True
    )
    operands = fused_operands(table, layout=1)
    model = one_node_model(
        "GatherNBits",
        {name: operands[name] for name in ("B", "scales", "zero_points")},
        {"K": 90, "bits": 3, "block_size": 32, "layout": 1},
        dtype=np.int64,
        output_dtype=np.float32,
    )
    (rows,) = open_session(model, None).run(None, {"X": np.zeros((2, 0), np.int64)})
    assert rows.shape == (2, 0, 90)


@pytest.mark.parametrize("factor_type", ["float16", "float32", "int8", "int4"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_floats_with_factors(library: Path | None, dtype: Float, factor_type: str) -> None:
    rng = np.random.default_rng(5)
    rows, columns = SHAPE
    weight = rng.standard_normal(SHAPE).astype(np.float32)
    weight[:, ::2] = 0
    factors = random_typed_factors(rng, SHAPE, rank=6, factor_type=factor_type)
    operands: dict[str, NDArray[Any] | None] = {"weight": np.ascontiguousarray(weight.T)}
    operands |= factor_arrays(factors)
    session = open_session(one_node_model(DENSE_OP, operands, {}, dtype=dtype), library)
    x: NDArray[Any] = rng.standard_normal((2, 5, columns)).astype(dtype)
    (actual,) = session.run(None, {"X": x})
    assert actual.dtype == dtype
    wide = x.astype(np.float64)
    up, down = (part.astype(np.float64) for part in (factors.up(), factors.down()))
    expected = wide @ weight.T.astype(np.float64) + wide @ down.T @ up.T
    magnitude = np.abs(wide) @ (np.abs(weight) + np.abs(up) @ np.abs(down)).T.astype(np.float64)
    # The sum over the columns, that over the rank, the scales and the last addition.
    bound = (columns + factors.rank + 3) * 2.0**-24 * magnitude
    assert_close(actual, expected, bound)
    assert actual.shape == (2, 5, rows)
