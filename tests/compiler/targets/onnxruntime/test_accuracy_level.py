"""Whole builds with int8 activations, and with factors of every type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import pytest

from eoracc.compiler import driver
from eoracc.compiler.config.sections import OnnxRuntimeConfig
from eoracc.compiler.progress import SilentProgress
from eoracc.plugins.op import FUSED_OP
from eoracc.runtime.parity.record import PARITY_FILE, ParityRecord
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

INT8 = ("calibrate", {"quantize_gptq": {"bits": 3, "group_size": 16}})


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
@pytest.mark.parametrize("level", [0, 4])
def test_parity_holds_at_every_level(tmp_path: Path, level: int, factor_type: str) -> None:
    folder = tiny_workspace(tmp_path)
    config = tiny_config(
        (*INT8, {"eora": {"rank": 4, "factor_type": factor_type}}),
        onnxruntime={"accuracy_level": level},
    )
    built = driver.build(config, config_dir=folder, progress=SilentProgress())
    parity = built.report.parity
    assert parity["passed"]
    # The library rounds activations at level 4, the functions never do. Nor do inputs of single
    # linears need rounding, which leaves what float32 sums and integer factors make of them.
    # By whether the library ran them:
    cases: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for case in parity["logits"]:
        cases[case["through"] == "library"].append(case)
    rounded = [
        native["max_error"] > 20 * function["max_error"]
        for native, function in zip(cases[True], cases[False], strict=True)
    ]
    # With AVX2 alone only a few rows at a time are rounded: products of many are faster in floats.
    assert any(rounded) == (level == 4)
    for native, function in zip(cases[True], cases[False], strict=True):
        assert (native["tolerance"] > function["tolerance"]) == (level == 4)
        assert native["tolerance"] < parity["compression_effect"]
        assert function["tolerance"] < 0.01 * parity["compression_effect"]
    assert all(0 < one["tolerance_share"] < 0.5 for one in parity["linears"])
    nodes = [n for n in ir.load(built.output / "model.onnx").graph if n.op_type == FUSED_OP]
    assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {level}
    nodes = nodes[:-1]  # the head has no factors
    factors = {str(node.inputs[5].dtype) for node in nodes if len(node.inputs) > 7}  # type: ignore[union-attr]
    assert factors == {"FLOAT16" if factor_type == "float16" else "UINT8"}
    chunks = {
        -(-node.attributes["K"].as_int() // node.inputs[5].const_value.shape[1])  # type: ignore[union-attr, operator]
        for node in nodes
        if len(node.inputs) > 7
    }
    assert chunks == {{"float16": 1, "int8": 4, "int4": 8}[factor_type]}
    manifest = json.loads((built.output / "manifest.json").read_text())
    assert manifest["config"]["onnxruntime"]["accuracy_level"] == level


def test_float_activations_where_rounding_would_hide_compression(tmp_path: Path) -> None:
    """8 bits move logits less than rounded activations do: parity could tell nothing."""
    folder = tiny_workspace(tmp_path)
    quantize = {"bits": 8, "group_size": 16, "embedding_bits": None}
    passes = ("calibrate", {"quantize_gptq": quantize})
    config = tiny_config(passes, onnxruntime={"accuracy_level": 4})
    built = driver.build(config, config_dir=folder, progress=SilentProgress())
    (warning,) = (one for one in built.report.warnings if one.code == "float_activations")
    assert warning.linear is None
    assert warning.figures["bound"] >= warning.figures["compression_effect"] > 0
    assert "'accuracy_level: 0'" in warning.message
    nodes = [n for n in ir.load(built.output / "model.onnx").graph if n.op_type == FUSED_OP]
    assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {0}
    assert built.manifest.config["onnxruntime"]["accuracy_level"] == 0
    parity = built.report.parity
    assert parity["passed"]
    for case in parity["logits"]:
        assert case["tolerance"] < 0.1 * parity["compression_effect"]
    record = ParityRecord.load(built.output / PARITY_FILE)
    assert all(case.rounding == 0 for case in record.cases)


def test_level_4_is_the_default() -> None:
    assert OnnxRuntimeConfig().accuracy_level == 4
