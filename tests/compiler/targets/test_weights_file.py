"""Weights in a file of their own: where each lies, and what is read back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from eoracc.compiler.targets.weights_file import DATA_FILE, write_graph
from eoracc.runtime.onnxruntime.inference import open_inference

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


def model_of(*arrays: NDArray[Any]) -> ir.Model:
    """Gives back its initializers ``w0``, ``w1``, ... as outputs ``y0``, ``y1``, ..."""
    values = [
        ir.Value(name=f"w{i}", const_value=ir.tensor(array, name=f"w{i}"))
        for i, array in enumerate(arrays)
    ]
    nodes = [ir.node("Identity", [value]) for value in values]
    outputs = [node.outputs[0] for node in nodes]
    for i, (output, value) in enumerate(zip(outputs, values, strict=True)):
        tensor = value.const_value
        assert tensor is not None
        output.name, output.type = f"y{i}", ir.TensorType(tensor.dtype)
        output.shape = ir.Shape(tensor.shape.numpy())
    graph = ir.Graph([], outputs, nodes=nodes, initializers=values, opset_imports={"": 21})
    return ir.Model(graph, ir_version=10)


ARRAYS = (
    np.arange(301, dtype=np.uint8)[:, None] + np.zeros(1, np.uint8),
    np.linspace(-1, 1, 999, dtype=np.float32),
    np.ones(64, np.float32),  # 256 bytes stay in model.onnx
    np.linspace(-2, 2, 6001).astype(np.float16).reshape(17, 353),
    (np.arange(1021) % 16).astype(ml_dtypes.uint4),
)


def test_tensors_lie_at_cache_lines_in_graph_order(tmp_path: Path) -> None:
    path = write_graph(model_of(*ARRAYS), tmp_path)
    tensors = [value.const_value for value in ir.load(path).graph.initializers.values()]
    places = [
        None if tensor is None or not isinstance(tensor, ir.ExternalTensor) else tensor.offset
        for tensor in tensors
    ]
    # 301 bytes end in the fifth line, 3996 more in the 68th, 12002 more in the 256th.
    assert places == [0, 320, None, 4352, 16384]
    assert (tmp_path / DATA_FILE).stat().st_size == 16384 + 511
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_a_runtime_reads_tensors_between_pages(tmp_path: Path) -> None:
    arrays = [array for array in ARRAYS if array.dtype != ml_dtypes.uint4]
    path = write_graph(model_of(*arrays), tmp_path)
    for array, read in zip(
        arrays, open_inference(str(path), None, 1, "it").run(None, {}), strict=True
    ):
        np.testing.assert_array_equal(read, array)


def test_types_are_those_that_tensors_do_not_tell(tmp_path: Path) -> None:
    half = ir.Value(
        name="half",
        const_value=ir.tensor(np.ones(4, np.float16), name="half"),
        type=ir.TensorType(ir.DataType.FLOAT16),
        shape=ir.Shape([4]),
    )
    whole, total = ir.node("Cast", [half], {"to": 1}), ir.node("Relu", [half])
    last = ir.node("Cast", total.outputs, {"to": 1})
    result = ir.node("Add", [*whole.outputs, *last.outputs])
    for name, node in (("wide", whole), ("kept", total), ("last", last), ("y", result)):
        node.outputs[0].name = name
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType(1)), ir.Shape([4])
    total.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    nodes = [whole, total, last, result]
    graph = ir.Graph([], result.outputs, nodes=nodes, initializers=[half], opset_imports={"": 21})
    path = write_graph(ir.Model(graph, ir_version=10), tmp_path)
    proto = onnx.load(path)
    assert {info.name for info in proto.graph.value_info} == {"kept", "last"}
    (y,) = open_inference(str(path), None, 1, "it").run(None, {})
    np.testing.assert_array_equal(y, np.full(4, 2, np.float32))


def test_the_model_keeps_its_tensors(tmp_path: Path) -> None:
    model = model_of(*ARRAYS)
    before = [value.const_value for value in model.graph.initializers.values()]
    write_graph(model, tmp_path)
    assert [value.const_value for value in model.graph.initializers.values()] == before
    with pytest.raises(FileNotFoundError):
        write_graph(model, tmp_path / "missing")
    assert [value.const_value for value in model.graph.initializers.values()] == before


def test_small_tensors_alone_make_no_file(tmp_path: Path) -> None:
    write_graph(model_of(np.ones(64, np.float32)), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
