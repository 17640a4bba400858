from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from eoracc.errors import PluginError
from eoracc.plugins.operands import (
    BITS,
    CHUNK,
    LowRank,
    NBitsWeight,
    merge_factors,
    pack_codes,
    split_rows,
    tile_codes,
    tile_rows,
    unpack_codes,
    untile_codes,
    untile_integers,
    untile_rows,
)
from tests.plugins.banks import random_typed_factors
from tests.plugins.fused_op import random_factors, random_weight


def pack_bit_by_bit(codes: NDArray[np.uint8], *, bits: int, group_size: int) -> NDArray[np.uint8]:
    """The layout as its docstring words it: code i of a group takes bits [i*bits, (i+1)*bits)."""
    rows, columns = codes.shape
    groups = -(-columns // group_size)
    packed = np.zeros((rows, groups, group_size * bits // 8), np.uint8)
    for row in range(rows):
        for column in range(columns):
            group, i = divmod(column, group_size)
            for bit in range(bits):
                value = (int(codes[row, column]) >> bit) & 1
                byte, place = divmod(i * bits + bit, 8)
                packed[row, group, byte] |= value << place
    return packed


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", [8, 16, 24, 64])
def test_pack_matches_bit_by_bit(bits: int, group_size: int) -> None:
    rng = np.random.default_rng(0)
    for columns in (1, 8, 23, 64, 65):
        codes = rng.integers(0, 2**bits, (3, columns), np.uint8)
        packed = pack_codes(codes, bits=bits, group_size=group_size)
        expected = pack_bit_by_bit(codes, bits=bits, group_size=group_size)
        np.testing.assert_array_equal(packed, expected)


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    runs=st.integers(1, 32),
    rows=st.integers(0, 5),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
)
def test_unpack_inverts_pack(bits: int, runs: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)
    packed = pack_codes(codes, bits=bits, group_size=8 * runs)
    np.testing.assert_array_equal(unpack_codes(packed, bits=bits, in_features=columns), codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("in_features", [64, 90])
def test_layout_is_that_of_onnxruntime(bits: int, in_features: int) -> None:
    """MatMulNBits of the same bytes, times the identity, gives the weight back."""
    weight = random_weight(
        np.random.default_rng(1),
        (5, in_features),
        bits=bits,
        group_size=32,
        zero_points=False,
        scales=np.float32,
    )
    node = helper.make_node(
        "MatMulNBits",
        ["X", "B", "scales"],
        ["Y"],
        domain="com.microsoft",
        K=in_features,
        N=5,
        bits=bits,
        block_size=32,
    )
    graph = helper.make_graph(
        [node],
        "peer",
        [helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, [None, in_features])],
        [helper.make_tensor_value_info("Y", onnx.TensorProto.FLOAT, [None, 5])],
        [
            numpy_helper.from_array(weight.packed, "B"),
            numpy_helper.from_array(weight.scales, "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (product,) = session.run(None, {"X": np.eye(in_features, dtype=np.float32)})
    np.testing.assert_allclose(
        product.T, weight.dequantize(), atol=2 * float(np.finfo(np.float32).eps), rtol=0
    )


def test_dequantize_by_hand() -> None:
    weight = NBitsWeight.from_codes(
        np.array([[0, 7, 3, 4, 5, 6, 1, 2, 7]], np.uint8),
        np.array([[0.5, 2.0]], np.float16),
        np.array([[3, 1]], np.uint8),
        bits=3,
        group_size=8,
    )
    expected = [[-1.5, 2.0, 0.0, 0.5, 1.0, 1.5, -1.0, -0.5, 12.0]]
    np.testing.assert_array_equal(weight.dequantize(), expected)
    assert weight.nbytes == 6 + 4 + 2
    assert (weight.out_features, weight.in_features) == (1, 9)


def test_low_rank_product() -> None:
    factors = random_factors(np.random.default_rng(2), (4, 6), rank=3)
    expected = factors.lora_b.astype(np.float64) @ factors.lora_a.astype(np.float64)
    np.testing.assert_allclose(factors.product(), expected, rtol=1e-5, atol=1e-6)
    assert (factors.rank, factors.nbytes) == (3, 2 * (3 * 6 + 4 * 3))
    empty = LowRank(lora_a=np.zeros((0, 6), np.float16), lora_b=np.zeros((4, 0), np.float16))
    np.testing.assert_array_equal(empty.product(), np.zeros((4, 6)))


def code_in_tiles(tiled: NDArray[np.uint8], row: int, column: int, bits: int) -> int:
    """The code of one element, read as the layout is worded: tile, chunk, quad, byte, bits."""
    quad, i = divmod(column % CHUNK[bits], 4)
    vectors = tiled[row // 16, column // CHUNK[bits]].reshape(-1, 64)
    byte = 4 * (row % 16) + i
    if bits == 3:
        low = int(vectors[quad // 4, byte]) >> 2 * (quad % 4) & 3
        return low | (int(vectors[2, byte]) >> quad & 1) << 2
    mask: int = 2**bits - 1
    return int(vectors[0, byte]) >> bits * quad & mask


@pytest.mark.parametrize(("bits", "chunk_bytes"), [(2, 64), (3, 192), (4, 64), (8, 64)])
def test_tiles_element_by_element(bits: int, chunk_bytes: int) -> None:
    rng = np.random.default_rng(3)
    for rows, columns in ((1, 1), (16, 32), (17, 33), (35, 70)):
        codes = rng.integers(0, 2**bits, (rows, columns), np.uint8)
        tiled = tile_codes(codes, bits=bits, padding=1)
        assert tiled.shape == (-(-rows // 16), -(-columns // CHUNK[bits]), chunk_bytes)
        height, width = 16 * tiled.shape[0], CHUNK[bits] * tiled.shape[1]
        expected = np.ones((height, width), np.uint8)
        expected[:rows, :columns] = codes
        actual = [[code_in_tiles(tiled, r, c, bits) for c in range(width)] for r in range(height)]
        np.testing.assert_array_equal(actual, expected)


@settings(deadline=None)
@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 40),
    columns=st.integers(0, 100),
    seed=st.integers(0, 2**32 - 1),
)
def test_untile_inverts_tile(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)
    tiled = tile_codes(codes, bits=bits)
    back = untile_codes(tiled, bits=bits, out_features=rows, in_features=columns)
    np.testing.assert_array_equal(back, codes)
    tiles = tile_rows(codes)
    assert tiles.shape == (-(-rows // 16), columns, 16)
    assert tiles.sum(dtype=np.int64) == codes.sum(dtype=np.int64)
    np.testing.assert_array_equal(untile_rows(tiles, rows), codes)
    for row, column in ((0, 0), (rows - 1, columns - 1)):
        if codes.size:
            assert tiles[row // 16, column, row % 16] == codes[row, column]


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_weight_survives_tiling(bits: int, zero_points: bool) -> None:
    weight = random_weight(
        np.random.default_rng(4), (21, 90), bits=bits, group_size=24, zero_points=zero_points
    )
    tiles = weight.tiles()
    assert tiles["scales"].shape == (2, 4, 16)
    assert tiles["scales"].dtype == np.float16
    assert ("zero_points" in tiles) == zero_points
    back = NBitsWeight.from_tiles(
        tiles["B"],  # type: ignore[arg-type]
        tiles["scales"],  # type: ignore[arg-type]
        tiles.get("zero_points"),  # type: ignore[arg-type]
        bits=bits,
        group_size=24,
        out_features=21,
        in_features=90,
    )
    np.testing.assert_array_equal(back.dequantize(), weight.dequantize())
    np.testing.assert_array_equal(back.packed, weight.packed)


def test_int8_factors() -> None:
    rng = np.random.default_rng(5)
    factors = LowRank(
        lora_a=rng.integers(-127, 128, (5, 90), np.int8),
        lora_b=rng.integers(-127, 128, (37, 5), np.int8),
        lora_a_scale=rng.uniform(1, 2, 5).astype(np.float32),
        lora_b_scale=rng.uniform(1, 2, 37).astype(np.float32),
    )
    assert factors.lora_a_scale is not None
    assert factors.nbytes == 5 * 90 + 37 * 5 + 4 * (5 + 37)
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
    assert factors.nbytes == (5 * 90) // 2 + -(-37 * 5 // 2) + 4 * (5 + 37)
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
