"""The TensorRT backend: engines of an artifact on an NVIDIA GPU."""
