"""The model as ONNX Runtime sessions run it."""
