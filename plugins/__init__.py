"""The fused op: operands, oracle, function body, and the native library that speeds it up."""
