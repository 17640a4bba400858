"""TensorRT's builder takes the graphs. It needs no GPU; the engines are not run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.targets.tensorrt.lower_rtx import lower
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import find_linears
from eoracc.plugins.operands.weight import NBitsWeight
from tests.compiler.targets.tensorrt.test_lower_rtx import compress, loaded
from tests.optional import require

if TYPE_CHECKING:
    from pathlib import Path

require("tensorrt_rtx")

import tensorrt_rtx as trt  # noqa: E402 - after the check

SIZES = {
    "batch": (1, 1, 2),
    "sequence": (1, 8, 16),
    "past": (0, 8, 16),
    "total": (1, 16, 32),
    "logits": (1, 1, 2),
    "rank": (1, 4, 8),
}


class Errors(trt.ILogger):  # type: ignore[misc] # no types
    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
        if severity <= trt.ILogger.ERROR:
            self.texts.append(message)


def engine_size(model: ir.Model) -> int:
    """Bytes of the engine for compute capability 8.9."""
    errors = Errors()
    builder = trt.Builder(errors)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, errors)
    assert parser.parse(ir.to_proto(model).SerializeToString()), errors.texts
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for value in model.graph.inputs:
        sizes = [size if isinstance(size, int) else SIZES[str(size)] for size in value.shape or ()]
        shapes = (
            tuple(size if isinstance(size, int) else size[place] for size in sizes)
            for place in range(3)
        )
        profile.set_shape(value.name, *shapes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, errors.texts
    return int(engine.nbytes)


@pytest.mark.parametrize("cache", ["concat", "in_place"])
@pytest.mark.parametrize("family", ["gemma3", "phi3"])
def test_uncompressed(family: str, cache: Any, tmp_path: Path) -> None:  # noqa: ANN401
    capacity = 32 if cache == "in_place" else None
    assert engine_size(lower(loaded(family, tmp_path).model, cache=cache, capacity=capacity))


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 4, "factors": "int4"},
        {"bits": 3, "factors": "int8", "group_size": 40},
        {"bits": 8},
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_compressed_with_adapters(form: dict[str, Any], dtype: Any, tmp_path: Path) -> None:  # noqa: ANN401
    source = loaded("llama_bias", tmp_path)
    compress(source.model, **form)
    assert engine_size(lower(source.model, dtype=dtype, adapter_type=dtype))


def test_quantized_table_is_stored_once_and_stays_at_4_bits(tmp_path: Path) -> None:
    rows, width, group_size = 65536, 96, 16
    source = loaded("smollm", tmp_path, vocab_size=rows, hidden_size=width)
    plain = engine_size(lower(source.model))
    (table,), head = find_embeddings(source.model), find_linears(source.model)[-1]
    codes = np.random.default_rng(0).integers(0, 16, (rows, width)).astype(np.uint8)
    scales = np.ones((rows, width // group_size), np.float16)
    weight = NBitsWeight.from_codes(codes, scales, None, bits=4, group_size=group_size)
    head.quantize(weight)
    table.quantize(weight, tied=head)
    quantized = engine_size(lower(source.model))
    # Two bytes a number become a half, and two for 16 of them. What kernels take is less than a
    # second copy would, of either form.
    saved = rows * width * (2 - 0.5 - 2 / group_size)
    assert plain - quantized > saved - rows * width * 0.4
