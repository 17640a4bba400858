from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from tests.plugins.fused_op import (
    fused_model,
    random_int8_factors,
    random_weight,
)

SHAPE = (37, 90)


def test_weight_is_folded_when_the_model_is_loaded(tmp_path: Path) -> None:
    """What is left in a stock runtime are the products, not the dequantization."""
    rng = np.random.default_rng(9)
    weight = random_weight(rng, SHAPE, bits=3, group_size=16, zero_points=True)
    factors = random_int8_factors(rng, SHAPE, rank=5)
    model = fused_model(
        weight, factors, layout=1, norm_weight=np.ones(90, np.float32), norm_epsilon=1e-5
    )
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    left = {node.op_type for node in ir.load(tmp_path / "optimized.onnx").graph}
    assert "MatMul" in left or "Gemm" in left
    assert not left & {"BitShift", "BitwiseAnd", "Gather", "Flatten", "Transpose", "Split"}
