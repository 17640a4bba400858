"""Target onnxruntime: lower the graph for ONNX Runtime and write it."""
