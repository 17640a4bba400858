from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from eoracc.runtime.onnxruntime.float32_twin import float32_twin

if TYPE_CHECKING:
    from numpy.typing import NDArray

FLOAT, FLOAT16, BFLOAT16 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16


def chain(dtype: ir.DataType) -> ir.Model:
    """``y = float32((x w) scale)``, all narrow until the end."""
    x, y = (
        ir.Value(name=name, type=ir.TensorType(kind), shape=ir.Shape([2, 3]))
        for name, kind in (("x", dtype), ("y", FLOAT))
    )
    arrays = {"w": np.eye(3) / 3, "scale": np.array(1.1)}
    constants = {
        name: ir.Value(
            name=name,
            const_value=ir.Tensor(array.astype(dtype.numpy()), dtype=dtype, name=name),
            type=ir.TensorType(dtype),
            shape=ir.Shape(array.shape),
        )
        for name, array in arrays.items()
    }
    tape = ir.tape.Tape()
    product = tape.op("MatMul", [x, constants["w"]])
    scaled = tape.op("Mul", [product, constants["scale"]])
    for value in (product, scaled):
        value.type = ir.TensorType(dtype)
    tape.op("Cast", [scaled], {"to": int(FLOAT)}, output=y)
    graph = ir.Graph(
        [x],
        [y],
        nodes=tape.nodes,
        initializers=list(constants.values()),
        opset_imports={"": 24},
        name="chain",
    )
    return ir.Model(graph, ir_version=11)


def run(model: ir.Model, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session: Any = onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    result: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return result


X = np.random.default_rng(0).standard_normal((2, 3)).astype(np.float32)


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_constants_are_rounded_and_nothing_else(dtype: ir.DataType) -> None:
    numpy = dtype.numpy()
    third, scale = (np.array(one).astype(numpy).astype(np.float32) for one in (1 / 3, 1.1))
    actual = run(float32_twin(chain(dtype)), X)
    np.testing.assert_allclose(actual, X * third * scale, rtol=4 * 2.0**-24)
    # What it must not be: rounded on the way, or with the numbers that were rounded.
    assert np.abs(actual / (X * np.float32(1.1 / 3)) - 1).max() > 2.0**-14


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16])
def test_rounded_twin_rounds_what_each_node_gives(dtype: ir.DataType) -> None:
    numpy = dtype.numpy()

    def rounded(array: Any) -> NDArray[np.float32]:  # noqa: ANN401
        return np.asarray(array).astype(numpy).astype(np.float32)

    expected = rounded(rounded(X * rounded(1 / 3)) * rounded(1.1))
    np.testing.assert_array_equal(run(float32_twin(chain(dtype), rounded=True), X), expected)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_graph_itself_stays_as_it_is(*, rounded: bool) -> None:
    model = chain(FLOAT16)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    twin = float32_twin(model, rounded=rounded)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    assert twin.graph.inputs[0].dtype == FLOAT
    assert twin.graph.initializers["w"].const_value is model.graph.initializers["w"].const_value


def test_a_graph_of_float32_is_its_own_twin() -> None:
    model = chain(FLOAT)
    twin = float32_twin(model, rounded=True)
    assert [node.op_type for node in twin.graph] == [node.op_type for node in model.graph]
