#!/usr/bin/env bash
# onnx 1.23.2: external data is refused once its file has a second name (a hard link).
#
# Behaviour: onnx.load and onnx.checker refuse a valid model whose external data file has a link
# count above one. Copies by `cp -al`, deduplicating stores and snapshot backups make such files:
# the bytes, the folder and the model are unchanged, and the *original* stops loading too as soon as
# somebody else has linked it. onnxruntime runs the same files.
#
# Seen: onnx 1.23.2, onnxruntime 1.31.1, Python 3.11.7:
#   one name:  onnx loads, onnxruntime runs
#   two names: onnx refuses (ValidationError), onnxruntime runs
#
# Why it matters: an artifact that was copied with hard links runs, and cannot be inspected or
# changed by tools that read it through onnx. Copy the file itself first.
#
# Usage: findings/onnx_refuses_hard_links.sh
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6

cd "$folder"
venv/bin/python - <<'PROGRAM'
import os
import sys

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

SIZE = 4096
graph = helper.make_graph(
    [helper.make_node("Mul", ["x", "weight"], ["y"])],
    "graph",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, [SIZE])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, [SIZE])],
    [numpy_helper.from_array(np.ones(SIZE, np.float32), "weight")],
)
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
os.mkdir("model")
onnx.save(model, "model/model.onnx", save_as_external_data=True, location="weights.data")


def by_onnx():
    try:
        weight = onnx.load("model/model.onnx").graph.initializer[0]
        assert numpy_helper.to_array(weight).sum() == SIZE
    except Exception as error:
        return f"refuses ({type(error).__name__})"
    return "loads"


def by_onnxruntime():
    session = onnxruntime.InferenceSession("model/model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(None, {"x": np.ones(SIZE, np.float32)})[0].sum() == SIZE
    return "runs"


print(f"onnx {onnx.__version__}, onnxruntime {onnxruntime.__version__}")
seen = []
for names in ("one name", "two names"):
    if names == "two names":
        os.mkdir("copy")
        os.link("model/weights.data", "copy/weights.data")
    seen.append((by_onnx().split()[0], by_onnxruntime()))
    print(f"{names + ':':10} onnx {by_onnx()}, onnxruntime {by_onnxruntime()}")
if seen != [("loads", "runs"), ("refuses", "runs")]:
    sys.exit("the finding no longer holds")
PROGRAM
