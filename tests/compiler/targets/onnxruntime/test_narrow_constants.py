"""Constants in narrower types: what is narrowed, and that no bit of a result changes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from eoracc.compiler.targets.onnxruntime.narrow_constants import narrow_constants
from eoracc.compiler.targets.weights_file import DATA_FILE, write_graph
from eoracc.plugins.functions.overload import use_local_functions
from eoracc.plugins.op import DOMAIN, Input
from eoracc.runtime.artifact.graph_file import read_graph, stored_array
from tests.plugins.banks import random_typed_factors
from tests.plugins.fused_op import random_weight

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

ROWS, COLUMNS = 64, 512


SCALES = ("lora_a_scale", "lora_b_scale")


def vector(seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(COLUMNS).astype(np.float32)


def as_held_by(dtype: Any, array: NDArray[np.float32]) -> NDArray[np.float32]:  # noqa: ANN401
    return array.astype(dtype).astype(np.float32)


FLOAT16 = as_held_by(np.float16, vector(1))
VECTORS = {
    "half": FLOAT16,
    "brain": as_held_by(ml_dtypes.bfloat16, vector(2) * np.float32(1e-20)),
    "whole": vector(3),
    "nearly": np.concatenate([FLOAT16[:-1], vector(3)[:1]]),
    "large": np.full(COLUMNS, 1e6, np.float32) + np.float32(3),
    "short": FLOAT16[:255],
    "matrix": np.stack([FLOAT16, FLOAT16]),
}
STORED = {"half": np.float16, "brain": ml_dtypes.bfloat16}


def adding_model() -> ir.Model:
    """``y0 = x + half`` and so on."""
    nodes, values = [], []
    for i, (name, array) in enumerate(VECTORS.items()):
        shape = [1, array.shape[-1]]
        x = ir.Value(name=f"x{i}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        value = ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            type=ir.TensorType(ir.DataType.FLOAT),
            shape=ir.Shape(array.shape),
        )
        node = ir.node("Add", [x, value])
        node.outputs[0].name = f"y{i}"
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        nodes.append(node)
        values.append(value)
    inputs = [value for node in nodes for value in node.inputs[:1] if value is not None]
    outputs = [node.outputs[0] for node in nodes]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=values, opset_imports={"": 23})
    return ir.Model(graph, ir_version=11)


def test_vectors_that_sixteen_bits_hold_are_stored_in_them(tmp_path: Path) -> None:
    model = adding_model()
    narrow_constants(model.graph)
    graph = read_graph(write_graph(model, tmp_path)).graph
    for name in VECTORS:
        tensor = graph.initializers[name].const_value
        assert tensor is not None
        assert tensor.dtype.numpy() == STORED.get(name, np.float32), name
        (reader,) = graph.initializers[name].consumers()
        assert reader.op_type == ("Cast" if name in STORED else "Add")
    for node, array in zip(
        [node for node in graph if node.op_type == "Add"], VECTORS.values(), strict=True
    ):
        np.testing.assert_array_equal(stored_array(node.inputs[1]), array)


def test_a_runtime_folds_the_casts(tmp_path: Path) -> None:
    model = adding_model()
    narrow_constants(model.graph)
    path = write_graph(model, tmp_path)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    zeros = {x.name: np.zeros(x.shape, np.float32) for x in session.get_inputs()}
    for result, array in zip(session.run(None, zeros), VECTORS.values(), strict=True):
        np.testing.assert_array_equal(result, np.atleast_2d(array))
    left = {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}
    assert left == {"Add"}


def gathering_model(bits: int, largest: int) -> ir.Model:
    """``y = GatherNBits(indices)`` of a table in tiles whose zero points reach ``largest``."""
    rng = np.random.default_rng(bits)
    weight = random_weight(rng, (ROWS, COLUMNS), bits=bits, group_size=32, zero_points=True)
    assert weight.zero_points is not None
    weight.zero_points.flat[:2] = 0, largest
    indices = ir.Value(name="i", shape=ir.Shape([ROWS]), type=ir.TensorType(ir.DataType.INT64))
    operands = [
        ir.Value(
            name=name,
            const_value=ir.tensor(array, name=name),
            type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
            shape=ir.Shape(array.shape),
        )
        for name, array in weight.tiles().items()
    ]
    attributes = {"K": COLUMNS, "bits": bits, "block_size": 32, "layout": 1}
    node = ir.node("GatherNBits", [indices, *operands], attributes, domain=DOMAIN)
    y = node.outputs[0]
    y.name, y.type = "y", ir.TensorType(ir.DataType.FLOAT)
    opsets = {"": 23, DOMAIN: 1}
    graph = ir.Graph([indices], [y], nodes=[node], initializers=operands, opset_imports=opsets)
    model = ir.Model(graph, ir_version=11)
    use_local_functions([node], model.functions)
    return model


@pytest.mark.parametrize(
    ("bits", "largest", "stored"),
    [
        (2, 3, ir.DataType.UINT4),
        (3, 7, ir.DataType.UINT4),
        (4, 15, ir.DataType.UINT4),
        (4, 16, ir.DataType.UINT8),  # which no pass makes, but the op would take
        (6, 63, ir.DataType.UINT8),
        (8, 255, ir.DataType.UINT8),
    ],
)
def test_zero_points_take_half_a_byte_where_codes_do(
    tmp_path: Path, bits: int, largest: int, stored: ir.DataType
) -> None:
    model = gathering_model(bits, largest)
    results, sizes = [], []
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        path = write_graph(model, tmp_path / name)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {"i": np.arange(ROWS)})[0])
        sizes.append((path.parent / DATA_FILE).stat().st_size)
        narrow_constants(model.graph)
    np.testing.assert_array_equal(*results)
    zero_points = model.graph.initializers["zero_points"].const_value
    assert zero_points is not None
    assert zero_points.dtype == stored
    saved = ROWS * COLUMNS // 32 // 2 if stored == ir.DataType.UINT4 else 0
    assert sizes[0] - sizes[1] == saved


@pytest.mark.parametrize("is_half", [True, False])
def test_scales_of_factors_are_stored_in_float16_at_any_size(*, is_half: bool) -> None:
    factors = random_typed_factors(
        np.random.default_rng(5), (ROWS, COLUMNS), rank=3, factor_type="int4"
    )
    weight = random_weight(
        np.random.default_rng(6), (ROWS, COLUMNS), bits=4, group_size=32, zero_points=True
    )
    tiles = weight.tiles() | {"bias": None} | factors.tiles()
    values: list[ir.Value | None] = []
    for operand in tuple(Input)[1 : Input.lora_b_scale + 1]:
        array = tiles[operand.name]
        if array is not None and operand.name.endswith("a_scale"):
            array = array.astype(np.float16).astype(np.float32)
            array[1] = 0.75 if is_half else np.pi
        if array is not None and operand.name.endswith("b_scale"):
            array = array.astype(np.float16).astype(np.float32)
        tensor = None if array is None else ir.tensor(array, name=operand.name)
        values.append(None if tensor is None else ir.Value(name=operand.name, const_value=tensor))
    node = ir.node("MatMulNBitsLowRank", [ir.Value(name="x"), *values], {"bits": 4}, domain=DOMAIN)
    graph = ir.Graph(
        [],
        node.outputs,
        nodes=[node],
        initializers=[value for value in values if value is not None],
    )
    before = {name: stored_array(node.inputs[Input[name]]) for name in SCALES}
    narrow_constants(graph)
    types = [
        None if (tensor := graph.initializers[name].const_value) is None else tensor.dtype
        for name in SCALES
    ]
    first = ir.DataType.FLOAT16 if is_half else ir.DataType.FLOAT
    assert types == [first, ir.DataType.FLOAT16]
    for name in SCALES:
        np.testing.assert_array_equal(stored_array(node.inputs[Input[name]]), before[name])


def test_what_a_caller_can_set_keeps_its_type() -> None:
    model = adding_model()
    model.graph.inputs.append(model.graph.initializers["half"])
    narrow_constants(model.graph)
    assert model.graph.initializers["half"].dtype == ir.DataType.FLOAT
