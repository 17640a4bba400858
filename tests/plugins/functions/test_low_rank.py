from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from eoracc.plugins.operands.low_rank import merge_factors, ranked_tiles
from eoracc.plugins.reference import fused_matmul
from tests.plugins.banks import random_typed_factors
from tests.plugins.fused_op import (
    assert_close,
    attributes_of,
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


def test_int8_factors(library: Path | None) -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(rng, SHAPE, bits=3, group_size=32, zero_points=True)
    factors = random_int8_factors(rng, SHAPE, rank=5)
    model = fused_model(weight, factors)
    x = rng.standard_normal((3, 90), np.float32)
    (actual,) = open_session(model, library).run(None, {"X": x})
    expected = fused_matmul(x, weight, factors)
    assert_close(actual, expected, error_bound(x, weight, factors, None))


@pytest.mark.parametrize("rank", [0, 1, 16, 33])
def test_tiles_of_any_rank(rank: int) -> None:
    rng = np.random.default_rng(7)
    weight = random_weight(rng, SHAPE, bits=3, group_size=16, zero_points=True)
    for factors in (
        random_factors(rng, SHAPE, rank=rank),
        random_int8_factors(rng, SHAPE, rank=rank),
    ):
        session = open_session(fused_model(weight, factors, layout=1), None)
        for leading in ((0,), (2, 9)):
            x = rng.standard_normal((*leading, 90), np.float32)
            (actual,) = session.run(None, {"X": x})
            expected = fused_matmul(x, weight, factors)
            assert_close(actual, expected, error_bound(x, weight, factors, None))


@pytest.mark.parametrize("ranks", [(8, 0, 21), (0, 16, 4), (33, 7, 8)])
@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_tiles_of_parts_with_ranks_of_their_own(
    library: Path | None, factor_type: str, ranks: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(8)
    parts = (32, 16, 48)
    weight = random_weight(rng, (96, 90), bits=3, group_size=16, zero_points=True)
    own = [
        random_typed_factors(rng, (rows, 90), rank=rank, factor_type=factor_type)
        for rows, rank in zip(parts, ranks, strict=True)
    ]
    operands = fused_operands(weight, layout=1) | ranked_tiles(own, in_features=90)
    attributes = attributes_of(weight) | {"layout": 1, "parts": parts, "ranks": ranks}
    model = one_node_model("MatMulNBitsLowRank", operands, attributes)
    padded = merge_factors(own, parts, in_features=90, rank=48)
    for leading in ((0,), (2, 9)):
        x = rng.standard_normal((*leading, 90), np.float32)
        (actual,) = open_session(model, library).run(None, {"X": x})
        expected = fused_matmul(x, weight, padded, parts=parts)
        assert_close(actual, expected, error_bound(x, weight, padded, None, parts=parts))


def test_factors_as_graph_inputs(library: Path | None) -> None:
    """Rank 0 by default, another rank in each run: an adapter."""
    rng = np.random.default_rng(3)
    weight = random_weight(rng, SHAPE, bits=4, group_size=32, zero_points=True)
    off = random_factors(rng, SHAPE, rank=0)
    session = open_session(fused_model(weight, off, graph_inputs=("lora_a", "lora_b")), library)
    x = rng.standard_normal((3, 90), np.float32)
    (plain,) = session.run(None, {"X": x})
    assert_close(plain, fused_matmul(x, weight, None), error_bound(x, weight, None, None))
    for rank in (8, 3):
        factors = random_factors(rng, SHAPE, rank=rank)
        feeds = {"X": x, "lora_a": factors.lora_a, "lora_b": factors.lora_b}
        (actual,) = session.run(None, feeds)
        assert_close(
            actual, fused_matmul(x, weight, factors), error_bound(x, weight, factors, None)
        )
