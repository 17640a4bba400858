from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from eoracc.errors import ArtifactError
from eoracc.runtime.artifact.onnx_file import all_nodes, external_files, parse_onnx

PATH = Path("model.onnx")


def tensor(location: str) -> TensorProto:
    found = TensorProto(name=location, data_type=TensorProto.FLOAT, dims=[1])
    found.data_location = TensorProto.EXTERNAL
    found.external_data.add(key="location", value=location)
    return found


def node(name: str, **attributes: Any) -> onnx.NodeProto:  # noqa: ANN401 - of any op
    made: onnx.NodeProto = helper.make_node("Op", [], [], name=name, **attributes)
    return made


def nested() -> onnx.ModelProto:
    """A model with a tensor and a node at each place that can have one."""
    innermost = helper.make_graph([node("d")], "innermost", [], [], initializer=[tensor("d")])
    branch = helper.make_graph(
        [node("c", body=innermost)], "branch", [], [], initializer=[tensor("c")]
    )
    sparse = onnx.SparseTensorProto(values=tensor("values"), indices=tensor("indices"), dims=[1])
    graph = helper.make_graph(
        [
            node("a", value=tensor("attribute"), many=[tensor("first"), tensor("second")]),
            node("b", branches=[branch]),
        ],
        "graph",
        [],
        [],
        initializer=[tensor("initializer"), TensorProto(name="inside", raw_data=b"1234")],
        sparse_initializer=[sparse],
    )
    in_function = helper.make_graph([node("f")], "f", [], [], initializer=[tensor("deep")])
    function = helper.make_function(
        "own", "F", [], [], [node("e", body=in_function, value=tensor("function"))], []
    )
    function.attribute_proto.add(name="default", type=onnx.AttributeProto.TENSOR).t.CopyFrom(
        tensor("default")
    )
    model = helper.make_model(graph, functions=[function])
    model.training_info.add().algorithm.initializer.append(tensor("training"))
    return model


def test_every_node_and_file_is_found() -> None:
    model = parse_onnx(nested().SerializeToString(), PATH)
    assert sorted(found.name for found in all_nodes(model)) == ["a", "b", "c", "d", "e", "f"]
    assert external_files(model) == {
        *("attribute", "first", "second", "initializer", "values", "indices"),
        *("c", "d", "function", "deep", "default", "training"),
    }


def test_model_whose_tensors_are_inside_names_no_file() -> None:
    graph = helper.make_graph([node("a")], "g", [], [], initializer=[TensorProto(name="w")])
    assert not external_files(helper.make_model(graph))


@pytest.mark.parametrize("content", [b"no model", nested().SerializeToString()[:-3]])
def test_damaged_file(content: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx: is no ONNX model"):
        parse_onnx(content, PATH)
