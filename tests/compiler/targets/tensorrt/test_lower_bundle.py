"""The graph with the plugin's nodes: as its float32 twin in ONNX Runtime, against eager PyTorch."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from eoracc.compiler.targets.tensorrt.lower_bundle import half_product, kernel_cases, lower
from eoracc.errors import ModelError, PassError
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.spec import Stage, check
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.plugins.tensorrt.plugin import FIELDS, INPUTS
from eoracc.runtime.onnxruntime.graph_session import GraphSession
from tests.compiler.targets.tensorrt.test_lower_rtx import (
    check_parity,
    compress,
    loaded,
    rounded_eager,
    tokens,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

HALF = ir.DataType.FLOAT16


def graph_weights(
    model: ir.Model,
    dtype: ir.DataType = HALF,
    **options: Any,  # noqa: ANN401 - of compress
) -> dict[str, NDArray[np.float32]]:
    """Compress every linear; what the graph for the plugin multiplies with."""
    compress(model, **options)
    weights = {}
    for linear in find_linears(model):
        assert linear.quantized is not None
        weights[linear.name] = half_product(linear.name, linear.quantized, linear.factors, dtype)
    return weights


def session(lowered: ir.Model, work: Path) -> GraphSession:
    check(lowered, Stage.TENSORRT, after="lower")
    path = work / "model.onnx"
    ir.save(lowered, path, external_data="model.onnx.data", size_threshold_bytes=256)
    return GraphSession.open(path, threads=1)


def plugins(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == "eoracc"]


def operands(node: ir.Node) -> dict[str, ir.Value]:
    return {
        name: value for name, value in zip(INPUTS, node.inputs, strict=True) if value is not None
    }


FORMS: Mapping[str, dict[str, Any]] = {
    "int2_symmetric": {"bits": 2, "symmetric": True, "rank": 5},
    "int3_zeros": {"bits": 3, "factors": "int8"},
    "int4_zeros": {"bits": 4, "rank": 40},
    "int4_odd_groups": {"bits": 4, "group_size": 40, "factors": "int4", "rank": 33},
    "int8_symmetric": {"bits": 8, "symmetric": True},
    "int8_zeros": {"bits": 8, "rank": None},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama_bias", "gemma3"])
def test_graph_equals_eager_model(family: str, form: str, tmp_path: Path) -> None:
    """Prefill, decoding, a chunk on a cache, and rows padded on either side."""
    source = loaded(family, tmp_path)
    weights = graph_weights(source.model, **FORMS[form])
    lowered = lower(source.model)
    eager = rounded_eager(source, weights, torch.float16)
    check_parity(source, session(lowered, tmp_path), eager)
    assert Counter(node.op_type for node in lowered.graph)["MatMul"] == sum(
        len(operands(node)["down"].shape or ()) > 0 for node in plugins(lowered)
    )


@pytest.mark.parametrize("family", ["qwen2", "mistral", "phi3"])
def test_other_families(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    weights = graph_weights(source.model, bits=4)
    eager = rounded_eager(source, weights, torch.float16)
    check_parity(source, session(lower(source.model), tmp_path), eager)


def test_bfloat16(tmp_path: Path) -> None:
    source = loaded("llama_bias", tmp_path)
    weights = graph_weights(source.model, ir.DataType.BFLOAT16, bits=4, scale_dtype=np.float32)
    eager = rounded_eager(source, weights, torch.bfloat16)
    check_parity(source, session(lower(source.model, dtype="bfloat16"), tmp_path), eager)


@pytest.mark.parametrize("rank", [0, 16])
def test_adapters_are_inputs(rank: int, tmp_path: Path) -> None:
    source = loaded("qwen2", tmp_path)
    weights = graph_weights(source.model, bits=4)
    run = session(lower(source.model, adapter_type="float16"), tmp_path)
    rng = np.random.default_rng(rank)
    factors: dict[str, NDArray[np.float32]] = {}
    for linear in find_linears(source.model)[:-1]:
        a = rng.standard_normal((rank, linear.in_features)).astype(np.float32)
        b = (0.1 * rng.standard_normal((linear.out_features, rank))).astype(np.float32)
        factors |= {f"{linear.name}.lora_a": a, f"{linear.name}.lora_b": b}
        weights[linear.name] += (b @ a).astype(np.float32)
    run.operands = factors
    check_parity(source, run, rounded_eager(source, weights, torch.float16))


def test_nodes_say_all_that_the_plugin_must_know(tmp_path: Path) -> None:
    source = loaded("llama_bias", tmp_path)
    compress(source.model, bits=3, rank=5)
    lowered = lower(source.model)
    nodes = plugins(lowered)
    linears = find_linears(source.model)
    assert [node.name for node in nodes] == [linear.name for linear in linears]
    for node, linear in zip(nodes, linears, strict=True):
        assert node.op_type == "MatMulNBitsLowRank"
        assert node.attributes.get_string("plugin_namespace", "") == "eoracc"
        assert node.attributes.get_string("plugin_version", "") == "1"
        assert [node.attributes.get_int(name, 0) for name in FIELDS] == [
            linear.in_features,
            linear.out_features,
            3,
            16,
        ]
        assert (node.domain, node.op_type, node.overload) in lowered.functions
        weight = linear.quantized
        assert weight is not None
        values = operands(node)
        codes = values["B"].const_value
        assert codes is not None
        # UINT8 constants TensorRT's parser makes INT32, four times the bytes.
        assert codes.dtype == ir.DataType.INT8
        np.testing.assert_array_equal(codes.numpy().view(np.uint8), weight.packed)
        assert values["zero_points"].dtype == ir.DataType.INT8
        assert all(values[name].dtype == HALF for name in set(INPUTS) - {"B", "zero_points"})


def test_biases_go_into_the_plugin(tmp_path: Path) -> None:
    source = loaded("llama_bias", tmp_path)
    compress(source.model, bits=4, rank=None)
    biased = [len(operands(node)["bias"].shape or ()) for node in plugins(lower(source.model))]
    assert biased == [1] * 14 + [0]
    # Where an adapter comes between, they stay behind it.
    with_slots = lower(source.model, adapter_type="float16")
    assert not any(len(operands(node)["bias"].shape or ()) for node in plugins(with_slots))


@pytest.mark.parametrize(("rank", "one_launch"), [(3, True), (32, True), (33, False)])
def test_ranks_are_filled_up_with_zeros(rank: int, *, one_launch: bool, tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    compress(source.model, bits=4, rank=rank)
    linear = find_linears(source.model)[1]
    assert linear.factors is not None
    values = operands(plugins(lower(source.model))[1])
    lora_b = values["lora_b"].const_value
    assert lora_b is not None
    padded = -(-rank // 16) * 16
    assert tuple(lora_b.shape) == (linear.out_features, padded)
    np.testing.assert_array_equal(lora_b.numpy()[:, :rank], linear.factors.lora_b)
    assert not lora_b.numpy()[:, rank:].any()
    assert len(values["lora_a"].shape or ()) == (2 if one_launch else 0)
    assert len(values["down"].shape or ()) == (0 if one_launch else 3)
    if not one_launch:
        product = values["down"].producer()
        assert product is not None
        assert product.inputs[1] is not None
        assert product.inputs[1].const_value is not None
        lora_a = product.inputs[1].const_value.numpy()
        np.testing.assert_array_equal(lora_a[:, :rank].T, linear.factors.lora_a)
        assert not lora_a[:, rank:].any()


def test_equal_nodes_share_a_function(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    compress(source.model, bits=4, rank=None)
    lowered = lower(source.model)
    assert [name for _, _, name in lowered.functions] == ["plugin_bits4_zeros"]


def test_what_a_bundle_compiles(tmp_path: Path) -> None:
    source = loaded("llama_bias", tmp_path)
    compress(source.model, bits=4, rank=5)
    cases = kernel_cases(lower(source.model))
    assert len(cases) == 15
    assert {case.rank for case in cases} == {0, 16}
    # 88 columns of the MLP are no multiple of 16; the head has no bias.
    assert {case.aligned for case in cases} == {True, False}
    assert [case.bias for case in cases] == [True] * 14 + [False]


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"bits": 4, "group_size": 8}, "block_size is 8: .* multiples of 16"),
        ({"bits": 4, "rank": 300}, "rank is 304: .* up to 256"),
    ],
)
def test_what_no_kernel_takes_is_refused(
    options: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    source = loaded("llama", tmp_path)
    compress(source.model, **options)
    with pytest.raises(PassError, match=f"_proj: is none for the target tensorrt: {problem}"):
        kernel_cases(lower(source.model))


def test_a_factor_beyond_float16_is_refused(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    compress(source.model, bits=4, rank=None)
    linear = find_linears(source.model)[0]
    a, b = (np.full(shape, 1e5, np.float32) for shape in ((1, 48), (linear.out_features, 1)))
    linear.compensate(LowRank(lora_a=a, lora_b=b))
    with pytest.raises(ModelError, match=r"q_proj: a low-rank factor holds 1e\+05"):
        lower(source.model)
    lower(source.model, dtype="bfloat16")


def test_source_graph_stays_as_it_is(tmp_path: Path) -> None:
    source = loaded("gemma3", tmp_path)
    compress(source.model, bits=4, rank=40)
    before = ir.to_proto(source.model).SerializeToString(deterministic=True)
    lower(source.model, adapter_type="float16")
    assert ir.to_proto(source.model).SerializeToString(deterministic=True) == before


def test_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    source = loaded("gemma3", tmp_path)
    compress(source.model, bits=4)
    first, second = (
        ir.to_proto(lower(source.model)).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second


def test_an_operand_of_another_shape_is_named(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    compress(source.model, bits=4)
    lowered = lower(source.model)
    node = plugins(lowered)[0]
    node.attributes["K"] = ir.AttrInt64("K", 32)
    with pytest.raises(PassError, match=r"q_proj: input '.*weight' has shape"):
        check(lowered, Stage.TENSORRT, after="lower")


def test_effect_of_compression_is_far_above_what_the_twin_leaves(tmp_path: Path) -> None:
    """So that parity above means something: other codes are seen."""
    source = loaded("llama", tmp_path)
    weights = graph_weights(source.model, bits=4)
    run = session(lower(source.model), tmp_path)
    ids = tokens()
    before = run.run_chunks(ids, np.ones_like(ids), (ids.shape[1],))
    linear = find_linears(source.model)[0]
    assert linear.quantized is not None
    codes = linear.quantized.codes()
    codes[0, 0] ^= 1
    changed = NBitsWeight.from_codes(
        codes,
        linear.quantized.scales,
        linear.quantized.zero_points,
        bits=4,
        group_size=16,
    )
    linear.quantize(changed)
    weights[linear.name] = half_product(linear.name, changed, linear.factors, HALF)
    run = session(lower(source.model), tmp_path)
    after = run.run_chunks(ids, np.ones_like(ids), (ids.shape[1],))
    assert np.abs(after - before).max() > 1e-4
    check_parity(source, run, rounded_eager(source, weights, torch.float16))
