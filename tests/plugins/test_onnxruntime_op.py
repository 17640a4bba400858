"""The custom op inside ONNX Runtime: threads, tensors that do not fit, external data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from eoracc.plugins.library import library_path
from tests.plugins.fused_op import (
    attributes_of,
    fused_model,
    fused_operands,
    one_node_model,
    open_session,
    random_factors,
    random_weight,
)

SHAPE = (600, 320)
FITTING = {"K": 32, "N": 4, "bits": 4, "block_size": 16}


@pytest.mark.parametrize("rows", [1, 5, 500])
def test_threads_do_not_change_a_bit(rows: int) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, SHAPE, bits=3, group_size=64, zero_points=True)
    model = fused_model(weight, random_factors(rng, SHAPE, rank=70))
    x = rng.standard_normal((rows, 320), np.float32)
    one, two = (
        open_session(model, library_path(), threads=threads).run(None, {"X": x})[0]
        for threads in (1, 2)
    )
    np.testing.assert_array_equal(one, two)


def test_kernel_wins_over_function() -> None:
    """Without a function the op is unknown to a runtime that lacks the library."""
    weight = random_weight(np.random.default_rng(1), SHAPE, bits=3, group_size=64, zero_points=True)
    model = one_node_model(
        "MatMulNBitsLowRank", fused_operands(weight), attributes_of(weight), with_function=False
    )
    with pytest.raises(Exception, match="MatMulNBitsLowRank"):
        open_session(model, None)
    both = fused_model(weight)
    x = np.random.default_rng(2).standard_normal((3, 320), np.float32)
    bare, chosen = (open_session(m, library_path()).run(None, {"X": x})[0] for m in (model, both))
    np.testing.assert_array_equal(bare, chosen)


def test_accuracy_level_4_is_computed_as_0() -> None:
    weight = random_weight(np.random.default_rng(3), SHAPE, bits=3, group_size=64, zero_points=True)
    x = np.random.default_rng(4).standard_normal((3, 320), np.float32)
    exact, loose = (
        open_session(fused_model(weight, accuracy_level=level), library_path()).run(None, {"X": x})
        for level in (0, 4)
    )
    np.testing.assert_array_equal(exact[0], loose[0])


def test_weights_in_an_external_file(tmp_path: Path) -> None:
    """The kernel reads operands where they lie, at whatever alignment the file gives them."""
    weight = random_weight(np.random.default_rng(5), SHAPE, bits=3, group_size=64, zero_points=True)
    serialized = fused_model(weight)
    model = onnx.load_from_string(serialized)
    data = tmp_path / "model.onnx.data"
    with data.open("wb") as stream:
        for tensor in model.graph.initializer:
            stream.write(b"\0")  # nothing is aligned
            raw = tensor.raw_data
            offset = stream.tell()
            stream.write(raw)
            onnx.external_data_helper.set_external_data(tensor, data.name, offset, len(raw))
            tensor.ClearField("raw_data")
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    x = np.random.default_rng(6).standard_normal((3, 320), np.float32)
    (expected,) = open_session(serialized, library_path()).run(None, {"X": x})
    (actual,) = open_session(str(path), library_path()).run(None, {"X": x})
    np.testing.assert_array_equal(actual, expected)


def _operands(**changes: NDArray[Any] | None) -> dict[str, NDArray[Any] | None]:
    fitting: dict[str, NDArray[Any] | None] = {
        "B": np.zeros((4, 2, 8), np.uint8),
        "scales": np.ones((4, 2), np.float16),
        "zero_points": None,
        "bias": None,
        "lora_a": None,
        "lora_b": None,
        "lora_a_scale": None,
        "lora_b_scale": None,
    }
    return fitting | changes


FACTORS: dict[str, NDArray[Any] | None] = {
    "lora_a": np.zeros((3, 32), np.float16),
    "lora_b": np.zeros((4, 3), np.float16),
}
INT8_FACTORS: dict[str, NDArray[Any] | None] = {
    "lora_a": np.zeros((3, 32), np.int8),
    "lora_b": np.zeros((4, 3), np.int8),
    "lora_a_scale": np.ones(3, np.float32),
    "lora_b_scale": np.ones(4, np.float32),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": np.zeros((4, 2, 7), np.uint8)}, r"B must have the shape \[4, 2, 8\]"),
        ({"B": np.zeros((3, 2, 8), np.uint8)}, r"B must have the shape"),
        ({"B": np.zeros((4, 16), np.uint8)}, r"B must have the shape"),
        ({"B": np.zeros((0, 2, 8), np.uint8)}, r"B must have the shape"),
        ({"scales": np.ones((4, 3), np.float16)}, r"scales must have the shape \[4, 2\]"),
        ({"scales": np.ones((8,), np.float16)}, r"scales must have the shape"),
        ({"scales": np.ones((4, 2), np.int32)}, "scales must be float or float16"),
        ({"zero_points": np.zeros((4, 1), np.uint8)}, "zero_points must have the shape"),
        ({"bias": np.zeros(5, np.float32)}, r"bias must have the shape \[4\]"),
        ({"lora_a": FACTORS["lora_a"]}, "lora_a and lora_b come together"),
        (FACTORS | {"lora_a": np.zeros((3, 31), np.float16)}, "lora_a must have the shape"),
        (
            FACTORS | {"lora_b": np.zeros((4, 2), np.float16)},
            r"lora_b must have the shape \[4, 3\]",
        ),
        (
            FACTORS | {"lora_a": np.zeros((3, 32), np.int32)},
            "lora_a must be float, float16 or int8",
        ),
        (INT8_FACTORS | {"lora_a_scale": None}, "lora_a_scale is missing"),
        (INT8_FACTORS | {"lora_b_scale": np.ones(3, np.float32)}, "lora_b_scale must have"),
    ],
)
def test_tensors_that_do_not_fit_are_an_error(
    changes: dict[str, NDArray[Any] | None], message: str
) -> None:
    model = one_node_model("MatMulNBitsLowRank", _operands(**changes), FITTING, with_function=False)
    session = open_session(model, library_path())
    with pytest.raises(Exception, match=f"MatMulNBitsLowRank: {message}"):
        session.run(None, {"X": np.zeros((2, 32), np.float32)})


@pytest.mark.parametrize("shape", [(2, 31), (32, 2), ()])
def test_activations_that_do_not_fit_are_an_error(shape: tuple[int, ...]) -> None:
    model = one_node_model("MatMulNBitsLowRank", _operands(), FITTING, with_function=False)
    session = open_session(model, library_path())
    with pytest.raises(Exception, match="the last dimension of X is not K = 32"):
        session.run(None, {"X": np.zeros(shape, np.float32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3, 4 or 8, not 5"),
        ({"block_size": 12}, "block_size must be a positive multiple of 8, not 12"),
        ({"block_size": 0}, "block_size must be a positive multiple of 8, not 0"),
        ({"K": 0}, "K and N must be positive"),
        ({"N": -1}, "K and N must be positive"),
        ({"accuracy_level": 2}, "accuracy_level must be 0 or 4, not 2"),
    ],
)
def test_attributes_that_make_no_sense_are_an_error(changes: dict[str, int], message: str) -> None:
    model = one_node_model(
        "MatMulNBitsLowRank", _operands(), FITTING | changes, with_function=False
    )
    with pytest.raises(Exception, match=message):
        open_session(model, library_path())


@pytest.mark.parametrize("attribute", ["K", "N", "bits", "block_size"])
def test_missing_attribute_is_an_error(attribute: str) -> None:
    attributes = {name: value for name, value in FITTING.items() if name != attribute}
    model = one_node_model("MatMulNBitsLowRank", _operands(), attributes, with_function=False)
    with pytest.raises(Exception, match=attribute):
        open_session(model, library_path())
