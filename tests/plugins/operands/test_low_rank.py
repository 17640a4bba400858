from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from eoracc.errors import PluginError
from eoracc.passes.solvers.factor_types import FactorType, factor_bytes
from eoracc.plugins.operands.codes import (
    untile_codes,
    untile_integers,
    untile_rows,
)
from eoracc.plugins.operands.low_rank import LowRank, merge_factors, ranked_tiles, split_rows
from tests.plugins.banks import random_typed_factors
from tests.plugins.fused_op import random_factors


def test_low_rank_product() -> None:
    factors = random_factors(np.random.default_rng(2), (4, 6), rank=3)
    expected = factors.lora_b.astype(np.float64) @ factors.lora_a.astype(np.float64)
    np.testing.assert_allclose(factors.product(), expected, rtol=1e-5, atol=1e-6)
    assert (factors.rank, factors.nbytes) == (3, 2 * (16 * 6 + 16 * 3))
    empty = LowRank(lora_a=np.zeros((0, 6), np.float16), lora_b=np.zeros((4, 0), np.float16))
    assert empty.nbytes == 0
    np.testing.assert_array_equal(empty.product(), np.zeros((4, 6)))


def test_int8_factors() -> None:
    rng = np.random.default_rng(5)
    factors = LowRank(
        lora_a=rng.integers(-127, 128, (5, 90), np.int8),
        lora_b=rng.integers(-127, 128, (37, 5), np.int8),
        lora_a_scale=rng.uniform(1, 2, 5).astype(np.float32),
        lora_b_scale=rng.uniform(1, 2, 37).astype(np.float32),
    )
    assert factors.lora_a_scale is not None
    assert factors.nbytes == 16 * 92 + 48 * 8 + 4 * (16 + 48)
    huge = replace(factors, lora_a_scale=np.full(5, 2.0**17, np.float32))
    assert huge.nbytes == factors.nbytes, "float16 cannot hold them"
    np.testing.assert_array_equal(
        factors.down(), factors.lora_a.astype(np.float32) * factors.lora_a_scale[:, None]
    )
    tiles = factors.tiles()
    assert {name: tile.shape for name, tile in tiles.items()} == {
        "lora_a": (1, 23, 64),
        "lora_a_scale": (16,),
        "lora_b": (3, 2, 64),
        "lora_b_scale": (48,),
    }
    codes = untile_codes(tiles["lora_a"], bits=8, out_features=16, in_features=92)  # type: ignore[arg-type]
    values = codes.astype(np.int16) - 128
    np.testing.assert_array_equal(values[:5, :90], factors.lora_a)
    assert not values[5:].any()
    assert not values[:, 90:].any()
    np.testing.assert_array_equal(tiles["lora_b_scale"][37:], 0)


def test_int4_factors() -> None:
    """Two quads to a vector, the value 0 as 8, padding included."""
    rng = np.random.default_rng(8)
    factors = random_typed_factors(rng, (37, 90), rank=5, factor_type="int4")
    assert factors.factor_type == "int4"
    assert factors.nbytes == (16 * 96 + 48 * 8) // 2 + 4 * (16 + 48)
    tiles = factors.tiles()
    assert {name: tile.shape for name, tile in tiles.items()} == {
        "lora_a": (1, 12, 64),
        "lora_a_scale": (16,),
        "lora_b": (3, 1, 64),
        "lora_b_scale": (48,),
    }
    a = tiles["lora_a"]
    assert a[0, 0, 4 * 2 + 3] & 15 == int(factors.lora_a[2, 3]) + 8, "quad 0 in the low half"
    assert a[0, 1, 4 * 2 + 3] >> 4 == int(factors.lora_a[2, 8 + 4 + 3]) + 8, "quad 1 in the high"
    whole = untile_integers(a, bits=4, rows=16, columns=96)  # type: ignore[arg-type]
    np.testing.assert_array_equal(whole[:5, :90], factors.lora_a)
    assert not whole[5:].any()
    assert not whole[:, 90:].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 3}, "factors have 8 or 4 bits, not 3"),
        ({"lora_a_scale": None}, "lora_a: integer factors have one scale a row"),
        ({"lora_a": np.full((2, 8), 8, np.int8)}, "lora_a: holds a value beyond 7 at 4 bits"),
        ({"lora_b": np.full((4, 2), -8, np.int8)}, "lora_b: holds a value beyond 7 at 4 bits"),
        (
            {"lora_b": np.zeros((4, 2), np.float16), "lora_b_scale": None},
            "lora_b: holds float16, while int4 factors hold int8",
        ),
    ],
)
def test_factors_that_do_not_hold_together(changes: dict[str, Any], message: str) -> None:
    whole = random_typed_factors(np.random.default_rng(9), (4, 8), rank=2, factor_type="int4")
    with pytest.raises(PluginError, match=message):
        replace(whole, **changes)


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_merged_factors_are_those_of_the_stacked_rows(factor_type: str) -> None:
    rng = np.random.default_rng(10)
    own = [
        random_typed_factors(rng, (rows, 24), rank=rank, factor_type=factor_type)
        for rows, rank in ((32, 3), (16, 16))
    ]
    merged = merge_factors([own[0], None, own[1]], (32, 48, 16), in_features=24, rank=16)
    assert merged.factor_type == factor_type
    assert (merged.lora_a.shape, merged.lora_b.shape) == ((48, 24), (96, 16))
    down, up = merged.down(), merged.up()
    for part, (start, stop, one) in enumerate(((0, 32, own[0]), (80, 96, own[1]))):
        place = 2 * part
        product = up[start:stop] @ down[16 * place : 16 * place + 16]
        np.testing.assert_allclose(product, one.product(), rtol=0, atol=1e-5)
    assert not down[16:32].any()
    assert not up[32:80].any()


def test_tiles_of_own_ranks_are_those_of_the_linears_alone() -> None:
    rng = np.random.default_rng(12)
    own = [
        random_typed_factors(rng, (rows, 24), rank=rank, factor_type="int4")
        for rows, rank in ((32, 3), (48, 0), (16, 33))
    ]
    merged = ranked_tiles([*own, None], in_features=24)
    assert {name: tiles.shape for name, tiles in merged.items()} == {
        "lora_a": (1 + 3, 3, 64),
        "lora_b": (2 * 1 + 1 * 5, 64),
        "lora_a_scale": (16 * 4,),
        "lora_b_scale": (32 + 16,),
    }
    for name, tiles in own[2].tiles().items():
        np.testing.assert_array_equal(merged[name].ravel()[-tiles.size :], tiles.ravel())
    with pytest.raises(PluginError, match="of rank 0 have no factors"):
        ranked_tiles([own[1], None], in_features=24)


@pytest.mark.parametrize("rank", [1, 8, 16, 21])
@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_bytes_are_those_of_the_tiles(factor_type: FactorType, rank: int) -> None:
    shape = (37, 90)
    factors = random_typed_factors(
        np.random.default_rng(9), shape, rank=rank, factor_type=factor_type
    )
    tiles = factors.tiles()
    stored = sum(array.nbytes for array in tiles.values())
    assert factors.nbytes == factors.input_bytes == stored
    scales = {name: tile for name, tile in tiles.items() if name.endswith("_scale")}
    halves = {
        name: scale.astype(np.float16).astype(np.float32)
        for name in scales
        if (scale := getattr(factors, name)) is not None
    }
    rounded = replace(factors, **halves)
    assert rounded.nbytes == factor_bytes(*shape, rank, factor_type)
    assert rounded.input_bytes == stored
    assert rounded.nbytes == stored - sum(tile.nbytes // 2 for tile in scales.values())


def test_factors_of_different_kinds_are_not_merged() -> None:
    rng = np.random.default_rng(11)
    own = [
        random_typed_factors(rng, (16, 24), rank=2, factor_type=kind)
        for kind in ("int4", "float16", "int8")
    ]
    with pytest.raises(PluginError, match="of one type, not float16 and int4"):
        merge_factors(own[:2], (16, 16), in_features=24, rank=2)
    with pytest.raises(PluginError, match="of one type, not none"):
        merge_factors([None], (16,), in_features=24, rank=2)
    widened = merge_factors([own[0], own[2]], (16, 16), in_features=24, rank=2)
    assert widened.factor_type == "int8"
    np.testing.assert_array_equal(widened.lora_a[:2], own[0].lora_a)
    # In so few columns nothing in the shape would tell the width of a code.
    narrow = random_typed_factors(rng, (16, 4), rank=2, factor_type="int4")
    assert merge_factors([narrow], (16,), in_features=4, rank=2).factor_type == "int8"


def test_parts_of_one_linear_share_its_down_projection() -> None:
    rng = np.random.default_rng(12)
    whole = random_typed_factors(rng, (48, 24), rank=5, factor_type="int8")
    parts = split_rows(whole, (32, 16))
    np.testing.assert_array_equal(np.concatenate([p.product() for p in parts]), whole.product())
    assert all(part.lora_a is whole.lora_a for part in parts)


def test_float_factors_in_tiles() -> None:
    factors = random_factors(np.random.default_rng(6), (37, 90), rank=5)
    tiles = factors.tiles()
    assert tiles.keys() == {"lora_a", "lora_b"}
    assert (tiles["lora_a"].shape, tiles["lora_b"].shape) == ((1, 90, 16), (3, 5, 16))
    np.testing.assert_array_equal(untile_rows(tiles["lora_b"], 37), factors.lora_b)
