"""Run a TensorRT target of an artifact: its engines, and what they ask for."""
