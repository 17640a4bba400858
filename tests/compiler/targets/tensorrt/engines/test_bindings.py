from __future__ import annotations

import onnx_ir as ir
import pytest

from eoracc.compiler.config.tensorrt import TensorRtRtxConfig
from eoracc.compiler.targets.tensorrt.engines.bindings import (
    bindings_of,
    profile_shapes,
    profiles_for,
)
from eoracc.runtime.tensorrt.engine_set import Binding

CONFIG = TensorRtRtxConfig(
    batch=(1, 2, 4), sequence=(1, 16, 32), context_length=64, logits=(1, 1, 8), rank=(0, 4, 8)
)
CONCAT = (
    Binding("input_ids", "input", "int64", ("batch", "sequence")),
    Binding("attention_mask", "input", "int64", ("batch", "total")),
    Binding("past_key_values.0.key", "input", "float16", ("batch", 2, "past", 16)),
    Binding("q_proj.lora_a", "input", "float16", ("rank", 32)),
    Binding("fixed", "input", "int64", (1,)),
    Binding("logits", "output", "float32", ("batch", "logits", 260)),
)
IN_PLACE = (*CONCAT[:2], Binding("past_key_values.0.key", "input", "float16", ("batch", 2, 64, 16)))


def test_bindings_are_those_of_the_graph() -> None:
    ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", 3]))
    mask = ir.Value(name="mask", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["batch"]))
    half = ir.Value(name="half", type=ir.TensorType(ir.DataType.BFLOAT16), shape=ir.Shape([2]))
    graph = ir.Graph([ids, mask], [half], nodes=[])
    assert bindings_of(graph) == (
        Binding("ids", "input", "int64", ("batch", 3)),
        Binding("mask", "input", "float32", ("batch",)),
        Binding("half", "output", "bfloat16", (2,)),
    )


def test_a_dimension_without_a_name_is_refused() -> None:
    value = ir.Value(
        name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", None])
    )
    with pytest.raises(ValueError, match="input ids has a dimension without a name"):
        bindings_of(ir.Graph([value], [], nodes=[]))


def test_profiles_agree_with_the_concatenation_at_each_corner() -> None:
    decode, prefill = profiles_for(CONFIG, CONCAT)
    assert (decode.name, prefill.name) == ("decode", "prefill")
    for profile in (decode, prefill):
        dims = profile.dims
        for corner in range(3):
            new = dims["total"][corner] - dims["past"][corner]
            assert new == dims["sequence"][corner]
        assert dims["batch"] == (1, 2, 4)
        assert dims["rank"] == (0, 4, 8)
    assert decode.dims["sequence"] == decode.dims["logits"] == (1, 1, 1)
    assert prefill.dims["sequence"] == (1, 16, 32)
    assert prefill.dims["logits"] == (1, 1, 8)


def test_every_call_within_the_context_has_a_profile() -> None:
    profiles = profiles_for(CONFIG, CONCAT)
    for past in range(64):
        for sequence in range(1, min(32, 64 - past) + 1):
            call = {
                "batch": 3,
                "sequence": sequence,
                "past": past,
                "total": past + sequence,
                "logits": 1,
                "rank": 0,
            }
            assert any(profile.takes(call) for profile in profiles), call


def test_a_cache_in_place_bounds_the_tokens_in_use() -> None:
    for profile in profiles_for(CONFIG, IN_PLACE):
        assert "past" not in profile.dims
        assert "rank" not in profile.dims
        assert profile.dims["total"][2] == 64


def test_shapes_of_inputs_that_a_call_decides() -> None:
    decode, _ = profiles_for(CONFIG, CONCAT)
    shapes = profile_shapes(CONCAT, decode)
    assert set(shapes) == {"input_ids", "attention_mask", "past_key_values.0.key", "q_proj.lora_a"}
    assert shapes["q_proj.lora_a"] == ((0, 32), (4, 32), (8, 32))
    assert shapes["past_key_values.0.key"][2] == (4, 2, 63, 16)
