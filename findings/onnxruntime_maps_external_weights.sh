#!/usr/bin/env bash
# onnxruntime 1.31.1: a session goes on reading its external weights from the file.
#
# Behaviour: on Linux, initializers with external data are mapped from their file for as long as the
# session lives. A tool that writes new weights into the same file, as `cp new.data old.data` does,
# changes the answers of a session that was made before; a file that is replaced by a rename does
# not. No event and no error tells of it.
#
# Seen: onnxruntime 1.31.1, onnx 1.23.2, Python 3.11.7, AMD EPYC with AVX2, Linux 6:
#   session made with weights of 1:         sum 4096
#   after another file took the name:       sum 4096
#   after the file was written over with 2: sum 8192
#
# Why it matters: a server that shall answer by the weights that it verified at its start must copy
# them, or its weights must only ever be replaced by a rename.
#
# Usage: findings/onnxruntime_maps_external_weights.sh
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


def write(path, value):
    with open(path, "r+b" if os.path.exists(path) else "wb") as file:
        file.write(np.full(SIZE, value, np.float32).tobytes())


def session():
    weight = numpy_helper.from_array(np.ones(SIZE, np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "weight"], ["y"])],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [SIZE])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [SIZE])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if os.path.exists("weights.data"):
        os.remove("weights.data")
    onnx.save(model, "model.onnx", save_as_external_data=True, location="weights.data")
    assert os.path.getsize("weights.data") == 4 * SIZE
    return onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])


def answer(model):
    return int(model.run(None, {"x": np.ones(SIZE, np.float32)})[0].sum())


print(f"onnxruntime {onnxruntime.__version__}, onnx {onnx.__version__}")
model = session()
first = answer(model)
print(f"session made with weights of 1:         sum {first}")
write("new.data", 3)
os.replace("new.data", "weights.data")
renamed = answer(model)
print(f"after another file took the name:       sum {renamed}")
model = session()
assert answer(model) == first
write("weights.data", 2)
written = answer(model)
print(f"after the file was written over with 2: sum {written}")
if (first, renamed, written) != (SIZE, SIZE, 2 * SIZE):
    sys.exit("the finding no longer holds: the answers are others")
PROGRAM
