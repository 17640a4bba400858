"""TensorRT for RTX's ONNX parser, run in a process of its own with a plugin creator of ours.

Its parser is that of TensorRT. It looks a creator up by name, version and namespace and hands it
the fields of the node; that is all there is to see here, since TensorRT for RTX runs no plugins of
Python's. The creator writes down what it is given, and then declines.

    python parser.py < request.json > answer.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Run this file on ``request``: ``models``, ``creator`` and the names of its ``fields``."""
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def main() -> None:
    """Parse each model; answer with what the creator got and what the parser said."""
    import tensorrt_rtx as trt

    request = json.load(sys.stdin)
    name, version, namespace = request["creator"]
    created: list[dict[str, Any]] = []
    messages: list[str] = []

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_version, self.plugin_namespace = name, version, namespace
            self.field_names = trt.PluginFieldCollection(
                [
                    trt.PluginField(field, np.array([], np.int64), trt.PluginFieldType.INT64)
                    for field in request["fields"]
                ]
            )

        def create_plugin(self, node: str, fields: Any, phase: Any) -> None:  # noqa: ANN401
            values = {field.name: np.asarray(field.data).tolist() for field in fields}
            created.append({"node": node, "fields": values, "phase": phase.name})

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            messages.append(f"{severity.name}: {message}")

    logger = Logger()
    builder = trt.Builder(logger)
    creator = Creator()
    if request.get("registered", True):
        trt.get_plugin_registry().register_creator(creator, namespace)
    answers = []
    for path in request["models"]:
        created.clear()
        messages.clear()
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse_from_file(path)
        errors = [
            {"node": parser.get_error(index).node_name(), "text": parser.get_error(index).desc()}
            for index in range(parser.num_errors)
        ]
        answers.append(
            {
                "parsed": parsed,
                "created": list(created),
                "errors": errors,
                "warnings": [one for one in messages if one.startswith("WARNING")],
            }
        )
    json.dump({"answers": answers, "version": trt.__version__}, sys.stdout)


if __name__ == "__main__":
    main()
