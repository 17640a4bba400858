"""Whole builds with int8 activations, and with factors of every type."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from eoracc.compiler import driver
from eoracc.compiler.progress import SilentProgress
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

INT8 = ("calibrate", {"quantize_gptq": {"bits": 4, "group_size": 16}})


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
    by_library, by_function = parity["linears"]
    # The library rounds activations at level 4, the function never does.
    assert (by_library["tolerance_share"] > 10 * by_function["tolerance_share"]) == (level == 4)
    nodes = [n for n in ir.load(built.output / "model.onnx").graph if n.domain == "eoracc"]
    assert {node.attributes["accuracy_level"].as_int() for node in nodes} == {level}
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
