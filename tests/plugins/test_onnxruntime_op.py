"""The custom op inside ONNX Runtime: threads, tensors that do not fit, external data."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from eoracc.plugins.library import library_path
from eoracc.plugins.operands.codes import BITS
from tests.plugins import native
from tests.plugins.cases import (
    Array,
    Case,
    assert_case,
    random_case,
    with_adapters,
    with_ranks,
)
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


def test_accuracy_level_4_rounds_activations() -> None:
    weight = random_weight(np.random.default_rng(3), SHAPE, bits=3, group_size=64, zero_points=True)
    x = np.random.default_rng(4).standard_normal((3, 320), np.float32)
    exact, loose = (
        open_session(fused_model(weight, accuracy_level=level), library_path()).run(None, {"X": x})
        for level in (0, 4)
    )
    assert (exact[0] != loose[0]).any()
    assert_case(loose[0], Case(x=x, weight=weight, accuracy_level=4))


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


# --- the tiled layout -----------------------------------------------------------------------------


def tiled_model(
    case: Case,
    *,
    graph_inputs: tuple[str, ...] = (),
    changes: Mapping[str, Array | None] = MappingProxyType({}),
) -> bytes:
    """A model of ``case``, whose operands are what the C interface takes, but for ``changes``."""
    arrays = native.prepare(case).arrays
    weight = case.weight
    chunk = 192 if weight.bits in (3, 6) else 64
    codes, factors = arrays["codes"], {name: arrays.get(name) for name in FACTOR_NAMES}
    assert codes is not None
    operands: dict[str, Array | None] = {
        "B": codes.reshape(len(codes), -1, chunk),
        "scales": arrays["scales"],
        "zero_points": arrays["zero_points"],
        "bias": case.bias,
        **{
            name: a if a is None or "scale" not in name else a.ravel()
            for name, a in factors.items()
        },
        "norm_weight": case.norm_weight,
        "residual": case.residual,
        **{name: arrays.get(name) for name in ADAPTER_NAMES},
        **changes,
    }
    fusions: dict[str, Any] = {"layout": 1, "accuracy_level": case.accuracy_level}
    if case.parts:
        fusions["parts"] = list(case.parts)
    if case.ranks:
        fusions["ranks"] = list(case.ranks)
    if case.activation:
        fusions["activation"] = case.activation
    if case.norm_weight is not None:
        fusions["norm_epsilon"] = case.norm_epsilon
    return one_node_model(
        "MatMulNBitsLowRank",
        operands,
        attributes_of(weight) | fusions,
        dtype=case.x.dtype.type,
        graph_inputs=graph_inputs,
        with_function=False,
    )


FACTOR_NAMES = ("lora_a", "lora_b", "lora_a_scale", "lora_b_scale")
ADAPTER_NAMES = (
    "adapter_a",
    "adapter_b",
    "adapter_a_scale",
    "adapter_b_scale",
    "adapter_index",
)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    "factor_types", [("float16", "float32"), ("int8", "int8"), ("int4", "int4")]
)
def test_tiles(bits: int, level: int, factor_types: tuple[str, str]) -> None:
    rng = np.random.default_rng(7)
    case = random_case(
        rng,
        3,
        (37, 90),
        bits=bits,
        rank=12,
        factor_types=factor_types,
        bias=True,
        accuracy_level=level,
    )
    (actual,) = open_session(tiled_model(case), library_path()).run(None, {"X": case.x})
    assert_case(actual, case)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("activation", ["", "silu", "gelu_tanh"])
def test_fusions(dtype: type[np.generic], activation: str) -> None:
    rng = np.random.default_rng(8)
    case = random_case(
        rng,
        4,
        (96, 90),
        bits=3,
        rank=16,
        parts=(48, 48) if activation else (64, 16, 16),
        activation=activation,
        bias=True,
        norm=True,
        residual=True,
        dtype=dtype,
        accuracy_level=4,
    )
    session = open_session(tiled_model(case), library_path())
    run = ort.OrtValue.ortvalue_from_numpy_with_onnx_type
    value = run(case.x, int(ir.DataType.from_numpy(case.x.dtype)))
    binding = session.io_binding()
    binding.bind_ortvalue_input("X", value)
    binding.bind_output("Y")
    session.run_with_iobinding(binding)
    (output,) = binding.get_outputs()
    actual = np.frombuffer(_bytes_of(output, case.expected.size), dtype)
    assert_case(actual.reshape(case.expected.shape), case)


def _bytes_of(value: ort.OrtValue, count: int) -> bytes:
    """The elements of a tensor, also of a type that NumPy does not have."""
    width = 4 if "float)" in value.data_type() else 2
    return ctypes.string_at(value.data_ptr(), count * width)


@pytest.mark.parametrize("factor_types", [("float16", "float16"), ("int8", "int8")])
def test_tiled_factors_as_graph_inputs(factor_types: tuple[str, str]) -> None:
    """Rank 0 by default, another rank in each run: an adapter."""
    rng = np.random.default_rng(9)

    def drawn(rank: int) -> Case:
        return random_case(rng, 2, (37, 90), rank=rank, factor_types=factor_types)

    off = drawn(0)
    names = FACTOR_NAMES if factor_types[0] == "int8" else FACTOR_NAMES[:2]
    session = open_session(tiled_model(off, graph_inputs=names), library_path())
    assert_case(session.run(None, {"X": off.x})[0], off)
    for rank in (12, 40, 4):
        case = replace(off, factors=drawn(rank).factors)
        arrays = native.prepare(case).arrays
        feeds = {name: np.asarray(arrays[name]) for name in names}
        feeds |= {name: array.ravel() for name, array in feeds.items() if "scale" in name}
        assert_case(session.run(None, {"X": off.x} | feeds)[0], case)


# --- adapters -------------------------------------------------------------------------------------


def adapter_case(dtype: str, *, rows: int = 6, level: int = 0) -> Case:
    """Three adapters of the linears of a decoder's q, k and v, and rows of sequences of two."""
    rng = np.random.default_rng(11)
    case = random_case(
        rng,
        rows,
        (112, 90),
        rank=16,
        parts=(64, 32, 16),
        norm=True,
        bias=True,
        accuracy_level=level,
    )
    return with_adapters(rng, case, ranks=(16, 0, 20), index=[2, -1, 0], dtype=dtype)


def adapter_feeds(case: Case) -> dict[str, Array]:
    arrays = native.prepare(case).arrays
    return {name: array for name in ADAPTER_NAMES if (array := arrays.get(name)) is not None}


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize("dtype", ["int8", "int4", "float16", "float32"])
def test_adapters_as_graph_inputs(dtype: str, level: int) -> None:
    """Without an adapter by default; each run may bring a bank, and each sequence uses its own."""
    case = adapter_case(dtype, level=level)
    off = replace(
        with_adapters(np.random.default_rng(0), case, ranks=(0,), index=[0], dtype=dtype),
        adapter_rank=0,
    )
    names = tuple(adapter_feeds(case))
    session = open_session(tiled_model(off, graph_inputs=names), library_path())
    assert_case(session.run(None, {"X": case.x})[0], off)
    for index in ([2, -1, 0], [0, 0, 1], [1], [2]):
        chosen = replace(case, adapter_index=tuple(index))
        batch = case.x.reshape(3, 2, 90)
        (actual,) = session.run(None, {"X": batch} | adapter_feeds(chosen))
        assert actual.shape == (3, 2, 112)
        assert_case(actual.reshape(6, 112), chosen)
    assert_case(session.run(None, {"X": case.x})[0], off)


def test_rows_of_a_matrix_are_a_batch() -> None:
    case = replace(adapter_case("int8"), adapter_index=(0, 2, 2, -1, 1, 0))
    session = open_session(tiled_model(case, graph_inputs=ADAPTER_NAMES), library_path())
    assert_case(session.run(None, {"X": case.x})[0], case)
    empty = {"X": case.x[:0], "adapter_index": np.zeros(0, np.int32)}
    assert session.run(None, empty)[0].shape == (0, 112)
    one = replace(case, x=case.x[:1], adapter_index=(2,))
    feeds = {"X": one.x[0], "adapter_index": np.array([2], np.int32)}
    assert_case(session.run(None, feeds)[0][None], one)


def test_adapters_may_be_constants() -> None:
    case = adapter_case("float16")
    session = open_session(tiled_model(case), library_path())
    (actual,) = session.run(None, {"X": case.x.reshape(3, 2, 90)})
    assert_case(actual.reshape(6, 112), case)


@pytest.mark.parametrize("dtype", ["int8", "float16"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"adapter_index": [0, 3, 0]}, "adapter_index must be below the number of adapters, 3, "),
        ({"adapter_index": [2**31 - 1]}, "adapter_index must be below"),
        ({"adapter_index": [0, 0]}, r"adapter_index must have the shape \[1\] or \[3\]"),
        ({"adapter_a": (3, 5)}, "adapter_a must have the shape .adapters, a multiple of 3, "),
        ({"adapter_a": (0, 6)}, "adapter_a must have the shape"),
        ({"adapter_a": (3, 6, 1)}, "adapter_a must have the shape"),
        ({"adapter_a": (3, 3)}, "adapter_b must have the shape"),
        ({"adapter_a": (4,)}, "adapter_b must have the shape"),
        ({"adapter_a": (2,)}, "adapter_index must be below the number of adapters, 2, "),
        ({"adapter_b": (3, 6)}, "adapter_b must have the shape"),
        ({"adapter_b": (3, 7, 3)}, "adapter_b must have the shape"),
        ({"adapter_a_scale": (3, 95)}, r"adapter_a_scale must have the shape \[3, 96\]"),
        ({"adapter_a_scale": (2,)}, r"adapter_a_scale must have the shape \[3, 96\]"),
    ],
)
def test_adapters_that_do_not_fit_are_an_error(
    dtype: str, changes: dict[str, list[int] | tuple[int, ...]], message: str
) -> None:
    """A list is an index; a tuple, the sizes that an operand's first dimensions are changed to."""
    case = adapter_case(dtype)
    feeds = adapter_feeds(case)
    session = open_session(tiled_model(case, graph_inputs=tuple(feeds)), library_path())
    for name, change in changes.items():
        if isinstance(change, list):
            feeds[name] = np.array(change, np.int32)
        else:
            feeds[name] = np.resize(feeds[name], change + feeds[name].shape[len(change) :])
    with pytest.raises(Exception, match=f"MatMulNBitsLowRank: {message}"):
        session.run(None, {"X": case.x.reshape(3, 2, 90)} | feeds)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_a", "adapter_a and adapter_index come together"),
        ("adapter_b", "adapter_b is missing"),
        ("adapter_a_scale", "adapter_a_scale is missing"),
        ("adapter_b_scale", "adapter_b_scale is missing"),
        ("adapter_index", "adapter_a and adapter_index come together"),
    ],
)
def test_missing_adapter_operands_are_an_error(name: str, message: str) -> None:
    case = adapter_case("int8")
    session = open_session(tiled_model(case, changes={name: None}), library_path())
    with pytest.raises(Exception, match=f"MatMulNBitsLowRank: {message}"):
        session.run(None, {"X": case.x.reshape(3, 2, 90)})


def test_adapters_of_two_types_are_an_error() -> None:
    case = adapter_case("float16")
    feeds = adapter_feeds(case)
    feeds["adapter_b"] = feeds["adapter_b"].astype(np.float32)
    session = open_session(tiled_model(case, changes=feeds), library_path())
    with pytest.raises(Exception, match="adapter_b must be float16"):
        session.run(None, {"X": case.x.reshape(3, 2, 90)})


def test_plain_operands_take_no_adapters() -> None:
    operands = _operands(
        norm_weight=None,
        residual=None,
        adapter_a=np.zeros((1, 0, 8, 64), np.uint8),
        adapter_b=None,
        adapter_a_scale=None,
        adapter_b_scale=None,
        adapter_index=np.zeros(1, np.int32),
    )
    model = one_node_model("MatMulNBitsLowRank", operands, FITTING, with_function=False)
    with pytest.raises(Exception, match="adapters need layout 1"):
        open_session(model, library_path()).run(None, {"X": np.zeros((2, 32), np.float32)})


@pytest.mark.parametrize("free", ["B", "scales", "zero_points", "lora_a", "lora_b"])
def test_plain_operands_may_change_between_runs(free: str) -> None:
    rng = np.random.default_rng(10)
    weight = random_weight(rng, (37, 90), bits=3, group_size=32, zero_points=True)
    other = random_weight(rng, (37, 90), bits=3, group_size=32, zero_points=True)
    factors, others = (random_factors(rng, (37, 90), rank=rank) for rank in (5, 5))
    x = rng.standard_normal((2, 90), np.float32)
    session = open_session(fused_model(weight, factors, graph_inputs=(free,)), library_path())
    assert_case(session.run(None, {"X": x})[0], Case(x=x, weight=weight, factors=factors))
    name = {"B": "packed"}.get(free, free)
    changed = other if hasattr(other, name) else others
    case = Case(
        x=x,
        weight=replace(weight, **({name: getattr(other, name)} if changed is other else {})),
        factors=replace(factors, **({name: getattr(others, name)} if changed is others else {})),
    )
    (actual,) = session.run(None, {"X": x, free: getattr(changed, name)})
    assert_case(actual, case)


# --- what does not fit ----------------------------------------------------------------------------


def _operands(**changes: Array | None) -> dict[str, Array | None]:
    fitting: dict[str, Array | None] = {
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


FACTORS: dict[str, Array | None] = {
    "lora_a": np.zeros((3, 32), np.float16),
    "lora_b": np.zeros((4, 3), np.float16),
}
INT8_FACTORS: dict[str, Array | None] = {
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
    changes: dict[str, Array | None], message: str
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
        ({"bits": 5}, "bits must be 2, 3, 4, 6 or 8, not 5"),
        ({"block_size": 12}, "block_size must be a positive multiple of 8, not 12"),
        ({"block_size": 0}, "block_size must be a positive multiple of 8, not 0"),
        ({"K": 0}, "K must be positive"),
        ({"N": -1}, "N must be positive"),
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


TILED = FITTING | {"N": 32, "layout": 1}


def _tiled_operands(**changes: Array | None) -> dict[str, Array | None]:
    fitting: dict[str, Array | None] = {
        "B": np.zeros((2, 4, 64), np.uint8),
        "scales": np.ones((2, 2, 16), np.float16),
        "zero_points": None,
        "bias": None,
        "lora_a": np.zeros((1, 8, 64), np.uint8),
        "lora_b": np.zeros((2, 4, 64), np.uint8),
        "lora_a_scale": np.ones(16, np.float32),
        "lora_b_scale": np.ones(32, np.float32),
        "norm_weight": np.ones(32, np.float32),
        "residual": np.zeros((2, 32), np.float32),
    }
    return fitting | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"B": np.zeros((2, 4, 63), np.uint8)}, r"B must have the shape \[2, 4, 64\]"),
        ({"B": np.zeros((1, 4, 64), np.uint8)}, r"B must have the shape \[2, 4, 64\]"),
        ({"scales": np.ones((2, 2, 8), np.float16)}, r"scales must have the shape \[2, 2, 16\]"),
        ({"zero_points": np.ones((32, 2), np.uint8)}, "zero_points must have the shape"),
        ({"lora_a": np.zeros((2, 8, 64), np.uint8)}, r"lora_a must have the shape \[1, 8, 64\]"),
        (
            {"lora_a": np.zeros((1, 8, 64), np.int8)},
            "lora_a must be float, float16 or, for int8 and int4",
        ),
        ({"lora_a": np.zeros((1, 32, 8), np.float32)}, r"lora_a .* \[1, 32, 16\]"),
        ({"lora_b": np.zeros((2, 64), np.uint8)}, "lora_b must have three dimensions"),
        ({"lora_b": np.zeros((1, 4, 64), np.uint8)}, r"lora_b must have the shape \[2, 4, 64\]"),
        ({"lora_a_scale": np.ones(8, np.float32)}, r"lora_a_scale must have the shape \[16\]"),
        ({"lora_b_scale": None}, "lora_b_scale is missing"),
        ({"lora_b": None}, "lora_a and lora_b come together"),
        ({"norm_weight": np.ones(31, np.float32)}, r"norm_weight must have the shape \[32\]"),
        ({"residual": np.ones((1, 32), np.float32)}, r"residual must have the shape \[2, 32\]"),
        ({"residual": np.ones(64, np.float32)}, r"residual must have the shape \[2, 32\]"),
    ],
)
def test_tiles_that_do_not_fit_are_an_error(changes: dict[str, Array | None], message: str) -> None:
    x = {"X": np.zeros((2, 32), np.float32)}
    for operands in ({}, changes):
        model = one_node_model(
            "MatMulNBitsLowRank", _tiled_operands(**operands), TILED, with_function=False
        )
        session = open_session(model, library_path())
        if not operands:
            session.run(None, x)
            continue
        with pytest.raises(Exception, match=f"MatMulNBitsLowRank: {message}"):
            session.run(None, x)


@pytest.mark.parametrize("level", [0, 4])
@pytest.mark.parametrize(
    "factor_types", [("float16", "float32"), ("int8", "int8"), ("int4", "int4")]
)
def test_parts_with_ranks_of_their_own(level: int, factor_types: tuple[str, str]) -> None:
    rng = np.random.default_rng(9)
    case = random_case(
        rng,
        3,
        (96, 90),
        rank=24,
        factor_types=factor_types,
        parts=(64, 16, 16),
        accuracy_level=level,
    )
    case = with_ranks(case, (8, 0, 24))
    (actual,) = open_session(tiled_model(case), library_path()).run(None, {"X": case.x})
    assert_case(actual, case)


@pytest.mark.parametrize(
    ("ranks", "changes", "message"),
    [
        ([16, 8], {}, r"lora_a_scale must have the shape \[32\]"),
        ([20, 0], {"lora_a_scale": 32}, r"lora_b must have the shape \[5, 64\]"),
        ([8, 0], {}, r"lora_a must have the shape \[1, 8, 64\]"),
        ([16, 8], {"lora_a_scale": 32}, r"lora_b must have the shape \[6, 64\]"),
        ([16, 8], {"lora_a_scale": 32, "lora_b": 6, "lora_b_scale": 16}, "lora_b_scale must have"),
    ],
)
def test_ranks_that_do_not_fit_are_an_error(
    ranks: list[int], changes: dict[str, int], message: str
) -> None:
    operands = _tiled_operands(lora_a=np.zeros((2, 8, 64), np.uint8))
    for name, length in changes.items():
        shape = (length, 64) if name == "lora_b" else (length,)
        operands[name] = np.zeros(shape, np.uint8 if name == "lora_b" else np.float32)
    attributes = TILED | {"parts": [16, 16], "ranks": ranks}
    model = one_node_model("MatMulNBitsLowRank", operands, attributes, with_function=False)
    with pytest.raises(Exception, match=message):
        open_session(model, library_path()).run(None, {"X": np.zeros((2, 32), np.float32)})


def test_merged_ranks_are_whole_tiles() -> None:
    attributes = TILED | {"parts": [16, 16]}
    changed = _tiled_operands(lora_b=np.zeros((2, 2, 64), np.uint8))
    model = one_node_model("MatMulNBitsLowRank", changed, attributes, with_function=False)
    with pytest.raises(Exception, match="the rank of 2 merged linears must be a multiple of 16"):
        open_session(model, library_path()).run(None, {"X": np.zeros((2, 32), np.float32)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layout": 2}, "layout must be 0 or 1, not 2"),
        ({"activation": "relu"}, "activation must be"),
        ({"activation": "a_name_that_is_much_too_long"}, "activation must be"),
        ({"activation": "silu"}, "an activation needs two equal parts"),
        ({"activation": "silu", "parts": [16, 8, 8]}, "a positive multiple of 16"),
        ({"parts": [16, 32]}, "parts must add up to N = 32"),
        ({"parts": [48, -16]}, "a positive multiple of 16"),
        ({"parts": [16] * 9}, "at most 8 parts, not 9"),
        ({"parts": [16, 16], "layout": 0}, "parts need layout 1"),
        ({"parts": [16, 16], "ranks": [16]}, "a rank for each of 2 parts, not 1 ranks"),
        ({"parts": [16, 16], "ranks": [16, -1]}, "ranks must not be negative"),
        ({"ranks": [16], "layout": 0}, "ranks need layout 1"),
    ],
)
def test_fusions_that_make_no_sense_are_an_error(changes: dict[str, Any], message: str) -> None:
    model = one_node_model(
        "MatMulNBitsLowRank", _tiled_operands(), TILED | changes, with_function=False
    )
    with pytest.raises(Exception, match=message):
        open_session(model, library_path())
