"""Targets tensorrt_rtx and tensorrt: lower the graph, build and bundle engines."""
