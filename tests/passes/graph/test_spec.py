from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.errors import PassError
from eoracc.passes.graph.linears import Linear, find_linears
from eoracc.passes.graph.spec import OPS, Stage, check, check_linears
from eoracc.plugins.op import DOMAIN
from eoracc.plugins.operands.dense import DenseWeight
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.banks import random_typed_factors
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

RNG = np.random.default_rng(3)


@pytest.fixture
def model(tmp_path: Path) -> ir.Model:
    return load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path).model


def compress(linear: Linear, *, rank: int = 2) -> ir.Node:
    rows, columns = linear.out_features, linear.in_features
    groups = -(-columns // 16)
    linear.quantize(
        NBitsWeight.from_codes(
            RNG.integers(0, 8, (rows, columns), np.uint8),
            np.ones((rows, groups), np.float16),
            np.full((rows, groups), 4, np.uint8),
            bits=3,
            group_size=16,
        )
    )
    linear.compensate(
        LowRank(
            lora_a=np.zeros((rank, columns), np.float16), lora_b=np.zeros((rows, rank), np.float16)
        )
    )
    return linear.node


def refused(model: ir.Model, stage: Stage, match: str) -> None:
    with pytest.raises(PassError, match=match) as caught:
        check(model, stage, after="some_pass")
    assert "after some_pass" in str(caught.value)


def refused_linear(linear: Linear, match: str, stage: Stage = Stage.COMPRESSED) -> None:
    with pytest.raises(PassError, match=match) as caught:
        check_linears([linear], stage, after="some_pass")
    assert "after some_pass, node model" in str(caught.value)


def test_stages_allow_more_and_more() -> None:
    assert OPS[Stage.FRONTEND] < OPS[Stage.COMPRESSED] < OPS[Stage.ONNXRUNTIME]


def test_fused_op_may_stand_only_after_compression(model: ir.Model) -> None:
    check(model, Stage.FRONTEND, after="frontend")
    compress(find_linears(model)[3])
    check(model, Stage.COMPRESSED, after="compress")
    refused(
        model,
        Stage.FRONTEND,
        "node model.layers.0.self_attn.o_proj: operator eoracc::MatMulNBitsLowRank is not allowed",
    )


def test_fused_op_needs_a_function_in_the_end(model: ir.Model) -> None:
    compress(find_linears(model)[0])
    refused(model, Stage.ONNXRUNTIME, "q_proj: has no function body")


def test_unknown_operator(model: ir.Model) -> None:
    node = ir.node("Einsum", [model.graph.inputs[0]], {"equation": "ij->ij"}, name="strange")
    model.graph.append(node)
    refused(model, Stage.FRONTEND, "node strange: operator Einsum is not allowed")


def test_domain_that_is_not_imported(model: ir.Model) -> None:
    compress(find_linears(model)[0])
    del model.graph.opset_imports[DOMAIN]
    refused(model, Stage.COMPRESSED, "q_proj: the graph does not import .* 'eoracc'")


def test_input_that_nothing_defines(model: ir.Model) -> None:
    node = find_linears(model)[0].node
    node.replace_input_with(0, ir.Value(name="ghost"))
    refused(model, Stage.FRONTEND, "reads 'ghost', which nothing before it defines")


def test_node_before_its_input(model: ir.Model) -> None:
    node = find_linears(model)[0].node
    first = model.graph[0]
    model.graph.remove(node)
    model.graph.insert_before(first, node)
    refused(model, Stage.FRONTEND, "which nothing before it defines")


def test_output_that_is_not_computed(model: ir.Model) -> None:
    model.graph.outputs[0] = ir.Value(name="logits")
    refused(model, Stage.FRONTEND, "output 'logits' is not computed")


def test_dangling_initializer(model: ir.Model) -> None:
    tensor = ir.tensor(np.zeros(3, np.float32), name="left_over")
    model.graph.register_initializer(ir.Value(name="left_over", const_value=tensor))
    refused(model, Stage.FRONTEND, "initializer left_over: is used by no node")


def test_initializer_of_another_shape(model: ir.Model) -> None:
    value = model.graph.initializers["model.norm.weight"]
    value.const_value = ir.tensor(np.zeros(3, np.float32), name=value.name)
    refused(model, Stage.FRONTEND, "initializer model.norm.weight: is declared as")


def test_initializer_without_a_tensor(model: ir.Model) -> None:
    model.graph.initializers["model.norm.weight"].const_value = None
    refused(model, Stage.FRONTEND, "initializer model.norm.weight: holds no tensor")


def test_matmul_of_another_width(model: ir.Model) -> None:
    linear = next(linear for linear in find_linears(model) if linear.role == "down_proj")
    linear.node.replace_input_with(0, find_linears(model)[0].input)
    refused(model, Stage.FRONTEND, r"multiplies \[.*48\] with \[88,48\]")


@pytest.mark.parametrize(
    ("position", "array", "match"),
    [
        (1, np.zeros((96, 3, 5), np.uint8), r"weight_packed' has shape .*, not \(96, 3, 6\)"),
        (1, np.zeros((96, 3, 6), np.int8), "weight_packed' is INT8, not UINT8"),
        (2, np.zeros((96, 2), np.float16), r"scales' has shape .*, not \(96, 3\)"),
        (2, np.zeros((96, 3), np.float64), "scales' is DOUBLE, not FLOAT16 or FLOAT"),
        (3, np.zeros((95, 3), np.uint8), r"zero_points' has shape .*, not \(96, 3\)"),
        (5, np.zeros((2, 47), np.float16), r"lora_a' has shape .*, not \(2, 48\)"),
        (6, np.zeros((96, 3), np.float16), r"lora_b' has shape .*, not \(96, 2\)"),
    ],
)
def test_operand_of_another_form(
    model: ir.Model, position: int, array: np.ndarray, match: str
) -> None:
    value = compress(find_linears(model)[0]).inputs[position]
    assert value is not None
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    refused(model, Stage.COMPRESSED, f"q_proj: input 'model.layers.0.self_attn.q_proj.{match}")


def test_missing_operand(model: ir.Model) -> None:
    compress(find_linears(model)[0]).replace_input_with(2, None)
    refused(model, Stage.COMPRESSED, "q_proj: input 2 is missing")


def test_one_factor_only(model: ir.Model) -> None:
    compress(find_linears(model)[0]).replace_input_with(6, None)
    refused(model, Stage.COMPRESSED, "has only one of its two low-rank factors")


@pytest.mark.parametrize(("name", "value"), [("bits", 5), ("block_size", 12), ("block_size", 0)])
def test_attribute_that_no_weight_has(model: ir.Model, name: str, value: int) -> None:
    compress(find_linears(model)[0]).attributes.add(ir.AttrInt64(name, value))
    refused(model, Stage.COMPRESSED, f"{name}={value}.* is not a stored form")


def test_fused_input_of_another_width(model: ir.Model) -> None:
    linears = find_linears(model)
    down = next(linear for linear in linears if linear.role == "down_proj")
    compress(down).replace_input_with(0, linears[0].input)
    refused(model, Stage.COMPRESSED, "whose last dimension is not K=88")


def prune(linear: Linear, *, kind: str = "int8") -> ir.Node:
    linear.quantize(DenseWeight(linear.weight() * (RNG.random((linear.out_features, 1)) < 0.5)))
    shape = linear.out_features, linear.in_features
    linear.compensate(random_typed_factors(RNG, shape, rank=2, factor_type=kind))
    return linear.node


@pytest.mark.parametrize("kind", ["float16", "int8", "int4"])
def test_floats_with_factors_stand_after_compression_and_in_onnxruntime(
    model: ir.Model, kind: str
) -> None:
    node = prune(find_linears(model)[0], kind=kind)
    check(model, Stage.COMPRESSED, after="some_pass")
    check(lower(model), Stage.ONNXRUNTIME, after="the lowering")
    refused(model, Stage.TENSORRT_RTX, f"operator eoracc::{node.op_type} is not allowed")


@pytest.mark.parametrize(
    ("position", "array", "match"),
    [
        (1, np.zeros((96, 48)), r"whose last dimension is not 96"),
        (1, np.zeros((48, 96), np.int8), "dense_weight' is INT8, not FLOAT16 or FLOAT"),
        (2, np.zeros((2, 47), np.int8), r"lora_a' has shape .*, not \(2, 48\)"),
        (3, np.zeros((96, 3), np.int8), r"lora_b' has shape .*, not \(96, 2\)"),
        (4, np.zeros(3, np.float32), r"lora_a_scale' has shape .*, not \(2,\)"),
        (5, np.zeros(95, np.float32), r"lora_b_scale' has shape .*, not \(96,\)"),
    ],
)
def test_operand_of_floats_of_another_form(
    model: ir.Model, position: int, array: np.ndarray, match: str
) -> None:
    value = prune(find_linears(model)[0]).inputs[position]
    assert value is not None
    value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
    refused(model, Stage.COMPRESSED, f"q_proj.*{match}")


def with_slots(model: ir.Model) -> tuple[ir.Model, ir.Node]:
    """``model`` lowered, and a node of it that takes adapters."""
    compress(find_linears(model)[0])
    lowered = lower(model, adapter_type="int8")
    check(lowered, Stage.ONNXRUNTIME, after="the lowering")
    return lowered, next(node for node in lowered.graph if len(node.inputs) > 11)


def test_half_a_slot(model: ir.Model) -> None:
    lowered, node = with_slots(model)
    node.replace_input_with(13, None)
    refused(lowered, Stage.ONNXRUNTIME, "an incomplete set of adapter operands: adapter_a_scale")


def test_adapter_that_no_run_can_set(model: ir.Model) -> None:
    lowered, node = with_slots(model)
    lowered.graph.inputs.remove(node.inputs[12])  # type: ignore[arg-type]
    refused(lowered, Stage.ONNXRUNTIME, "its adapter_b is not an input of the graph")


@pytest.mark.parametrize(
    ("rank", "kind", "position", "shape"),
    [
        (20, "int4", 5, (2, 7, 64)),
        (20, "int4", 6, (6, 5, 64)),
        (20, "int8", 5, (3, 12, 64)),
        (20, "float16", 6, (6, 40, 16)),
    ],
)
def test_factors_in_tiles_of_another_form(
    model: ir.Model, rank: int, kind: str, position: int, shape: tuple[int, ...]
) -> None:
    linear = find_linears(model)[0]
    compress(linear)
    size = (linear.out_features, linear.in_features)
    linear.compensate(random_typed_factors(RNG, size, rank=rank, factor_type=kind))
    lowered = lower(model)
    check(lowered, Stage.ONNXRUNTIME, after="the lowering")
    node = next(node for node in lowered.graph if node.domain == DOMAIN)
    value = node.inputs[position]
    assert value is not None
    value.shape = ir.Shape(shape)
    refused(lowered, Stage.ONNXRUNTIME, "has shape|do not fit")


def test_linears_of_every_form_pass(model: ir.Model) -> None:
    linears = find_linears(model)
    check_linears(linears, Stage.FRONTEND, after="frontend")
    compress(linears[0])
    plain = linears[1]
    plain.factorize(
        np.ones((plain.out_features, 3), np.float32), np.ones((3, plain.in_features), np.float32)
    )
    assert [len(linear.nodes) for linear in linears[:3]] == [1, 2, 1]
    check_linears(linears, Stage.COMPRESSED, after="some_pass")
    check(model, Stage.COMPRESSED, after="some_pass")


def test_linear_checks_name_the_pass_and_leave_other_linears_alone(model: ir.Model) -> None:
    first, second = find_linears(model)[:2]
    compress(first).attributes.add(ir.AttrInt64("bits", 5))
    check_linears([second], Stage.COMPRESSED, after="some_pass")
    refused_linear(first, "q_proj: bits=5 with block_size=16 is not a stored form")
    refused_linear(first, "operator eoracc::MatMulNBitsLowRank is not allowed", Stage.FRONTEND)


@pytest.mark.parametrize("position", [0, 1])
def test_linear_that_reads_what_is_not_in_the_graph(model: ir.Model, position: int) -> None:
    linear = find_linears(model)[0]
    compress(linear).replace_input_with(position, ir.Value(name="ghost"))
    refused_linear(linear, "q_proj: reads 'ghost', which the graph does not define")


def test_linear_whose_operand_was_removed_from_the_graph(model: ir.Model) -> None:
    linear = find_linears(model)[0]
    compress(linear)
    del model.graph.initializers[f"{linear.name}.scales"]
    refused_linear(linear, "reads 'model.layers.0.self_attn.q_proj.scales', which the graph does")


def test_linear_whose_operand_has_no_tensor_or_another_shape(model: ir.Model) -> None:
    linear = find_linears(model)[0]
    scales = compress(linear).inputs[2]
    assert scales is not None
    scales.const_value = ir.tensor(np.zeros(3, np.float16), name=scales.name)
    refused_linear(linear, "initializer model.layers.0.self_attn.q_proj.scales: is declared as")
    scales.const_value = None
    refused_linear(linear, "initializer model.layers.0.self_attn.q_proj.scales: holds no tensor")


def test_linear_whose_output_nothing_reads(model: ir.Model) -> None:
    linear = find_linears(model)[0]
    compress(linear)
    output = linear.node.outputs[0]
    output.replace_all_uses_with(linear.input)
    refused_linear(linear, "nothing reads its output")


def test_linear_that_is_not_in_the_graph(model: ir.Model) -> None:
    linear = find_linears(model)[0]
    output = linear.node.outputs[0]
    output.replace_all_uses_with(linear.input)
    model.graph.remove(linear.node)
    refused_linear(linear, "is not in the graph", Stage.FRONTEND)
