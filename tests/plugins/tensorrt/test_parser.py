"""TensorRT's ONNX parser, as TensorRT for RTX has it, on graphs with the plugin's nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from eoracc.plugins.tensorrt.plugin import FIELDS, PLUGIN, PLUGIN_VERSION
from tests.optional import require
from tests.plugins.tensorrt import parser

if TYPE_CHECKING:
    from pathlib import Path

NAMESPACE, _, NAME = PLUGIN.partition("::")
require("tensorrt_rtx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder, its linears in 3 bits with zero points, some with factors."""
    # The compiler imports torch: not while tests are collected.
    from eoracc.compiler.targets.tensorrt.lower_bundle import lower
    from tests.compiler.targets.tensorrt.test_lower_rtx import compress, loaded

    work: Path = tmp_path_factory.mktemp("graph")
    source = loaded("llama_bias", work)
    compress(source.model, bits=3, rank=40)
    path = work / "model.onnx"
    ir.save(lower(source.model), path, external_data="model.onnx.data", size_threshold_bytes=256)
    return path


def ask(*models: Path, version: str = PLUGIN_VERSION, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    creator = [NAME, version, options.pop("namespace", NAMESPACE)]
    request = {"models": list(map(str, models)), "creator": creator, "fields": FIELDS, **options}
    answers: list[dict[str, Any]] = parser.ask(request)["answers"]
    return answers


def alone(graph: Path) -> dict[str, Path]:
    """A model of its own for each node of the plugin, beside the whole one."""
    whole = onnx.load(graph)
    stored = {tensor.name: tensor for tensor in whole.graph.initializer}
    paths = {}
    for node in [node for node in whole.graph.node if node.domain == NAMESPACE]:
        half = onnx.TensorProto.FLOAT16
        inputs = [
            onnx.helper.make_tensor_value_info(name, half, ["batch", "sequence", None])
            for name in node.input
            if name not in stored
        ]
        output = onnx.helper.make_tensor_value_info(node.output[0], half, None)
        initializers = {name: stored[name] for name in node.input if name in stored}
        single = onnx.helper.make_graph(
            [node], "one", inputs, [output], list(initializers.values())
        )
        model = onnx.helper.make_model(
            single,
            functions=whole.functions,
            opset_imports=whole.opset_import,
            ir_version=whole.ir_version,
        )
        paths[node.name] = graph.with_name(f"{node.name}.onnx")
        onnx.save(model, paths[node.name])
    return paths


def test_every_node_finds_the_creator_with_its_fields(graph: Path) -> None:
    models = alone(graph)
    nodes = {str(node.name): node for node in ir.load(graph).graph if node.domain == NAMESPACE}
    assert len(models) == 15
    for (name, node), answer in zip(nodes.items(), ask(*models.values()), strict=True):
        fields = {field: [node.attributes[field].as_int()] for field in FIELDS}
        assert answer["created"] == [{"node": name, "fields": fields, "phase": "BUILD"}]
        # That the creator declines is all that the parser has to say against it.
        assert [error["node"] for error in answer["errors"]] == [name]
        assert "Could not create the plugin" in answer["errors"][0]["text"]


def test_whole_graph_is_taken_but_for_the_plugin(graph: Path) -> None:
    """The parser checks all nodes first, and then imports one after the other up to the first."""
    (answer,) = ask(graph)
    first = next(node for node in ir.load(graph).graph if node.domain == NAMESPACE)
    assert [error["node"] for error in answer["errors"]] == [first.name]
    assert [one["node"] for one in answer["created"]] == [first.name]


def test_bytes_stay_bytes(graph: Path) -> None:
    """Unsigned ones the parser makes four bytes each, which INT8 avoids."""
    (answer,) = ask(graph)
    assert not [line for line in answer["warnings"] if "converted" in line]
    model = ir.load(graph)
    node = next(node for node in model.graph if node.domain == NAMESPACE)
    codes = node.inputs[1]
    assert codes is not None
    assert codes.const_value is not None
    unsigned = codes.const_value.numpy().view(np.uint8)
    codes.const_value = ir.tensor(unsigned, name=codes.name)
    codes.type = ir.TensorType(ir.DataType.UINT8)
    path = graph.with_name("unsigned.onnx")
    ir.save(model, path)
    (answer,) = ask(path)
    assert [line for line in answer["warnings"] if f"UINT8 data {codes.name} is being" in line]


@pytest.mark.parametrize(
    "other", [{"version": "2"}, {"namespace": "elsewhere"}, {"registered": False}]
)
def test_another_version_or_namespace_is_another_plugin(graph: Path, other: dict[str, Any]) -> None:
    """Without the plugin the parser takes the functions, and not the integer operators in them."""
    (answer,) = ask(graph, **other)
    assert not answer["parsed"]
    assert not answer["created"]
    assert len(answer["errors"]) > 1
