from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from eoracc.plugins.operands import BITS, LowRank, NBitsWeight, pack_codes, unpack_codes
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
