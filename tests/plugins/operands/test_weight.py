from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from eoracc.plugins.operands.codes import (
    BITS,
)
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.fused_op import random_weight


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
    # A tile of 16 rows: a chunk of 32 columns, two scales, and two zero points of half a byte.
    assert weight.nbytes == 16 * (32 * 3 // 8 + 2 * 2 + 1)
    assert (weight.out_features, weight.in_features) == (1, 9)


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
    zeros = tiles["zero_points"].size if zero_points else 0
    stored = tiles["B"].nbytes + tiles["scales"].nbytes + (zeros // 2 if bits <= 4 else zeros)
    assert weight.nbytes == stored
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
