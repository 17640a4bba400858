"""The fused op for NVIDIA GPUs: Triton kernels, their tactics, and PTX without a GPU."""
