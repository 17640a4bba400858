from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from numpy.typing import NDArray

from eoracc.plugins.functions import local_function
from eoracc.plugins.library import library_path
from eoracc.plugins.operands import BITS, NBitsWeight, PluginError
from eoracc.plugins.reference import fused_matmul
from tests.plugins.fused_op import (
    Float,
    assert_close,
    attributes_of,
    error_bound,
    fused_model,
    fused_operands,
    one_node_model,
    open_session,
    random_factors,
    random_weight,
)

SHAPE = (37, 90)


@pytest.fixture(params=["function", "kernel"])
def library(request: pytest.FixtureRequest) -> Path | None:
    """No library, so that the function runs, or the native one."""
    return library_path() if request.param == "kernel" else None


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


def test_int8_factors(library: Path | None) -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(rng, SHAPE, bits=3, group_size=32, zero_points=True)
    a = rng.integers(-127, 128, (5, 90), np.int8)
    b = rng.integers(-127, 128, (37, 5), np.int8)
    a_scale, b_scale = ((rng.uniform(1, 2, n) / 500).astype(np.float32) for n in (5, 37))
    widened = random_factors(rng, SHAPE, rank=5, dtype=np.float32)
    widened.lora_a[:] = a * a_scale[:, None]
    widened.lora_b[:] = b * b_scale[:, None]
    operands = fused_operands(weight) | {
        "lora_a": a,
        "lora_b": b,
        "lora_a_scale": a_scale,
        "lora_b_scale": b_scale,
    }
    model = one_node_model("MatMulNBitsLowRank", operands, attributes_of(weight))
    x = rng.standard_normal((3, 90), np.float32)
    (actual,) = open_session(model, library).run(None, {"X": x})
    expected = fused_matmul(x, weight, widened)
    # Widening here and in the op takes two more roundings of each term.
    assert_close(actual, expected, 2 * error_bound(x, weight, widened, None))


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


def test_overloads_share_one_kernel() -> None:
    """Nodes of different widths in one model: each takes its own function, or the one kernel."""
    rng = np.random.default_rng(4)
    names = set()
    for bits in BITS:
        weight = random_weight(rng, SHAPE, bits=bits, group_size=32, zero_points=bits == 3)
        for factors in (None, random_factors(rng, SHAPE, rank=2)):
            names.add(_function_of(weight, fused_operands(weight, factors)).overload)
    assert names == {
        "bits2",
        "bits2_lora",
        "bits3_zeros",
        "bits3_zeros_lora",
        "bits4",
        "bits4_lora",
        "bits8",
        "bits8_lora",
    }


def test_function_does_not_depend_on_sizes() -> None:
    rng = np.random.default_rng(5)
    protos = []
    for columns in (90, 128):
        weight = random_weight(rng, (4, columns), bits=3, group_size=32, zero_points=True)
        function = _function_of(weight, fused_operands(weight))
        protos.append(ir.to_proto(function).SerializeToString(deterministic=True))
    assert protos[0] == protos[1]


@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_gather(bits: int, zero_points: bool, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(6)
    table = random_weight(rng, (50, 90), bits=bits, group_size=32, zero_points=zero_points)
    indices = np.asarray(rng.integers(0, 50, shape), np.int64)
    model = one_node_model(
        "GatherNBits",
        {"B": table.packed, "scales": table.scales, "zero_points": table.zero_points},
        {"K": 90, "bits": bits, "block_size": 32},
        dtype=np.int64,
        output_dtype=np.float32,
    )
    # The library has no kernel for it: the function must also run where it is registered.
    for library in (None, library_path()):
        (rows,) = open_session(model, library).run(None, {"X": indices})
        np.testing.assert_array_equal(rows, table.dequantize()[indices])


def _function_of(weight: NBitsWeight, operands: dict[str, NDArray[Any] | None]) -> ir.Function:
    inputs: list[ir.Value | None] = [ir.Value(name="X")]
    inputs += [None if array is None else ir.Value(name=name) for name, array in operands.items()]
    return local_function(
        ir.node("MatMulNBitsLowRank", inputs, attributes_of(weight), domain="eoracc", name="n")
    )


def _node(op_type: str, inputs: int | list[ir.Value | None], **attributes: int) -> ir.Node:
    if isinstance(inputs, int):
        inputs = [ir.Value(name=f"i{i}") for i in range(inputs)]
    return ir.node(op_type, inputs, attributes, domain="eoracc", name="some.linear")


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (_node("Other", 3, bits=3), "Other is no op of the eoracc domain"),
        (_node("MatMulNBitsLowRank", 3, bits=5), r"bits must be one of \(2, 3, 4, 8\), not 5"),
        (_node("MatMulNBitsLowRank", 3), "not None"),
        (_node("MatMulNBitsLowRank", 2, bits=3), "its input scales is missing"),
        (_node("MatMulNBitsLowRank", 6, bits=3), "lora_a and lora_b come together"),
        (_node("GatherNBits", 5, bits=3), "GatherNBits has at most 4 inputs"),
    ],
)
def test_foreign_nodes_are_refused(node: ir.Node, message: str) -> None:
    with pytest.raises(PluginError, match=f"node some.linear: .*{message}"):
        local_function(node)
