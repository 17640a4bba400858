"""The fused op as a TensorRT plugin whose kernels are compiled ahead of time."""
