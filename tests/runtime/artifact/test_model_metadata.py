from __future__ import annotations

import numpy as np
import onnx
import pytest

from eoracc.runtime.artifact.model_metadata import read_metadata


def model(**metadata: str) -> bytes:
    weight = onnx.numpy_helper.from_array(np.arange(300, dtype=np.float32), "weight")
    output = onnx.helper.make_tensor_value_info("weight", onnx.TensorProto.FLOAT, [300])
    graph = onnx.helper.make_graph([], "graph", [], [output], [weight])
    proto = onnx.helper.make_model(graph)
    onnx.helper.set_model_props(proto, metadata)
    content: bytes = proto.SerializeToString()
    return content


@pytest.mark.parametrize(
    "metadata", [{}, {"a": "1"}, {"eoracc.adapters": "x" * 70_000, "empty": "", "é": "ü"}]
)
def test_reads_what_onnx_writes(metadata: dict[str, str]) -> None:
    assert read_metadata(model(**metadata)) == metadata


@pytest.mark.parametrize(
    "content", [b"\x72", b"\x72\x7fabc", b"\xff" * 12, b"\x07", b"\x72\x02\x0a\x05"]
)
def test_no_model(content: bytes) -> None:
    with pytest.raises(ValueError, match="no protobuf message"):
        read_metadata(content)
