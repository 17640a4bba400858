from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler import driver
from eoracc.compiler.progress import SilentProgress
from eoracc.plugins.op import FUSED_OP, Input
from eoracc.runtime.artifact.genai_files import read_model_files
from eoracc.runtime.artifact.graph_file import read_graph
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir

_OPERANDS = (
    Input.B,
    Input.scales,
    Input.zero_points,
    Input.lora_a,
    Input.lora_b,
    Input.lora_a_scale,
    Input.lora_b_scale,
)


def operand_bytes(node: ir.Node) -> int:
    """What the file holds of the operands, some of which are cast when they are read."""
    values = [node.inputs[place] for place in _OPERANDS if place < len(node.inputs)]
    casts = [None if value is None else value.producer() for value in values]
    stored = [
        value if cast is None else cast.inputs[0] for value, cast in zip(values, casts, strict=True)
    ]
    arrays = [value.const_value for value in stored if value is not None]
    return sum(array.nbytes for array in arrays if array is not None)


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_an_artifact_takes_the_bytes_that_were_allocated(tmp_path: Path, factor_type: str) -> None:
    """Whatever ranks the parts of a node have, nothing but what the plan counts is stored."""
    workspace = tiny_workspace(tmp_path)
    allocate = {
        "bits_per_weight": 10 if factor_type == "float16" else 8,
        "ranks": [0, 4, 8, 16, 21],
        "widths": [3],  # so that q, k and v are one node
        "distortion": "relative",
    }
    passes: list[Any] = [
        {"allocate": allocate},
        "calibrate",
        "quantize_gptq",
        {"eora": {"factor_type": factor_type, "overrides": {"*.0.self_attn.k_proj": {"rank": 21}}}},
    ]
    config = tiny_config(
        passes,
        verify={"windows": 1, "window_length": 16, "parity": False},
    )
    driver.build(config, config_dir=workspace, progress=SilentProgress())
    report = json.loads((workspace / "out" / "report.json").read_text())
    graph = read_graph(read_model_files(workspace / "out").model).graph
    # The head has a width of its own and counts only where an override names it.
    nodes = [n for n in graph if n.op_type == FUSED_OP and ".layers." in str(n.name)]
    ranks = [tuple(node.attributes.get_ints("ranks", ())) for node in nodes]
    assert any(len(set(own)) > 1 for own in ranks), "no merged node has scattered ranks"
    assert sum(map(operand_bytes, nodes)) == report["surveys"][0]["bytes"]
