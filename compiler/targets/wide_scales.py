"""Scales that a graph stores in float32, which the plan of a folder counts in float16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eoracc.plugins.op import DOMAIN, Input

if TYPE_CHECKING:
    import onnx

__all__ = ["wide_scale_bytes"]

_SCALES = (Input.scales, Input.lora_a_scale, Input.lora_b_scale)
_FLOAT = 1
"""``TensorProto.FLOAT``: importing it would load the onnx package."""


def wide_scale_bytes(model: onnx.ModelProto) -> int:
    """Bytes that scales take beyond those of float16.

    Args:
      model: model.onnx as it is stored, without its weights.
    """
    # Of narrow scales the nodes read a cast, which is no initializer.
    read = {
        node.input[place]
        for node in model.graph.node
        if node.domain == DOMAIN
        for place in _SCALES
        if place < len(node.input)
    }
    count = sum(
        int(np.prod(tensor.dims))
        for tensor in model.graph.initializer
        if tensor.name in read and tensor.data_type == _FLOAT
    )
    return 2 * count
