from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.names import WINDOW_KEY
from eoracc.passes.graph.spec import Stage, check
from eoracc.passes.pack_projections import PackProjections
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from tests.graph_session import GraphSession, assert_close, padded_mask
from tests.tiny_models import FAMILIES, OTHER_FAMILIES, VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LENGTHS = (12, 8, 5)
TOKENS = 12


def tokens(rows: int = len(LENGTHS)) -> NDArray[np.int64]:
    return np.random.default_rng(17).integers(3, VOCABULARY, (rows, TOKENS))


def loaded(family: str, work: Path, **overrides: Any) -> LoadedModel:  # noqa: ANN401
    return load(str(tiny_model(family, work / "model", **overrides)), work=work)


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def check_parity(source: LoadedModel, lowered: ir.Model, work: Path, eager: Any = None) -> None:  # noqa: ANN401
    """Prefill, decode, a cached chunk and right-padded rows against eager PyTorch."""
    check(lowered, Stage.ONNXRUNTIME, after="lower")
    session = GraphSession(lowered, work)
    eager = load_eager(source.folder, {}) if eager is None else eager
    right = padded_mask(LENGTHS, TOKENS, left=False)
    for rows, mask, chunks in [
        (3, None, (TOKENS,)),
        (3, None, (8, 1, 1, 1, 1)),
        (1, None, (7, 5)),  # one row: the fused attention refuses a chunk on a cache in a batch
        (3, right, (TOKENS,)),
    ]:
        expected = reference_logits(eager, tokens(rows), mask, chunks=chunks)
        actual = session.logits(tokens(rows), mask, chunks=chunks)
        assert_close(actual, expected, source.config, mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_lowered_graph_equals_eager_model(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    lowered = lower(source.model)
    ops = count(lowered)
    assert ops["GroupQueryAttention"] == 2
    # The last norm sees fewer tokens than the sum before it.
    assert ops["SkipSimplifiedLayerNormalization"] == 3
    assert ops["Attention"] == ops["RotaryEmbedding"] == 0
    check_parity(source, lowered, tmp_path)


def test_source_graph_stays_as_it_is(tmp_path: Path) -> None:
    model = loaded("gemma3", tmp_path).model
    before = count(model), [value.name for value in model.graph.inputs]
    lower(model)
    assert (count(model), [value.name for value in model.graph.inputs]) == before
    check(model, Stage.FRONTEND, after="lower")


def test_tensors_are_shared_with_the_source(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path).model
    lowered = lower(model)
    for name, value in lowered.graph.initializers.items():
        if not name.startswith(("cache.", "logits")):
            assert value.const_value is model.graph.initializers[name].const_value


def test_inputs_and_outputs_are_those_of_genai(tmp_path: Path) -> None:
    graph = lower(loaded("llama", tmp_path).model).graph
    cache = [f"{block}.{kind}" for block in (0, 1) for kind in ("key", "value")]
    assert [value.name for value in graph.inputs] == [
        "input_ids",
        "attention_mask",
        *(f"past_key_values.{name}" for name in cache),
        "logits_to_keep",
    ]
    # By a 1 in the second place genai sees that it gets the last row only.
    assert [str(size) for size in graph.outputs[0].shape or ()] == ["batch", "1", str(VOCABULARY)]
    assert [value.name for value in graph.outputs] == [
        "logits",
        *(f"present.{name}" for name in cache),
    ]


def test_every_layer_has_its_own_window_and_tables(tmp_path: Path) -> None:
    lowered = lower(loaded("gemma3", tmp_path).model)
    nodes = [node for node in lowered.graph if node.op_type == "GroupQueryAttention"]
    assert [node.attributes.get_int("local_window_size", -1) for node in nodes] == [5, -1]
    assert len({node.inputs[7] for node in nodes}) == 2


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3", "mistral"])
def test_windows_of_some_layers(family: str, tmp_path: Path) -> None:
    fields: dict[str, object] = {"sliding_window": 4}
    if family.startswith("qwen"):
        fields |= {"use_sliding_window": True, "max_window_layers": 1}
    source = loaded(family, tmp_path, **fields)
    check_parity(source, lower(source.model), tmp_path)
    expected = reference_logits(load_eager(source.folder, {}), tokens())
    assert_close(GraphSession(source.model, tmp_path).logits(tokens()), expected, source.config)


def test_head_dimension_that_the_fused_rotary_does_not_take(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path, head_dim=24)
    lowered = lower(source.model)
    assert count(lowered)["RotaryEmbedding"] == 4
    assert "position_ids" in {value.name for value in lowered.graph.inputs}
    check_parity(source, lowered, tmp_path)


@pytest.mark.parametrize(("size", "padded"), [(6, 8), (12, 16), (100, 104)])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_heads_are_padded_to_what_the_fused_attention_takes(
    family: str, size: int, padded: int, tmp_path: Path
) -> None:
    source = loaded(family, tmp_path, head_dim=size)
    lowered = lower(source.model)
    assert count(lowered)["GroupQueryAttention"] == 2
    caches = [value for value in lowered.graph.inputs if "past_key_values" in str(value.name)]
    assert [value.shape[3] for value in caches if value.shape] == [padded] * 4
    check_parity(source, lowered, tmp_path)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 6), (4, 2)])
def test_padded_heads_are_shared_as_before(heads: int, kv_heads: int, tmp_path: Path) -> None:
    source = loaded(
        "llama", tmp_path, head_dim=20, num_attention_heads=heads, num_key_value_heads=kv_heads
    )
    check_parity(source, lower(source.model), tmp_path)


@pytest.mark.parametrize(("hidden", "share"), [(192, 0.75), (288, 0.25), (288, 0.5)])
def test_rotary_part_that_the_fused_rotary_does_not_take(
    hidden: int, share: float, tmp_path: Path
) -> None:
    """24 elements of 32, and 12 and 24 of 48: a table is half as wide, which 8 must divide."""
    rotary = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": share}
    source = loaded("phi3", tmp_path, hidden_size=hidden, rope_parameters=rotary)
    lowered = lower(source.model)
    assert count(lowered)["RotaryEmbedding"] == 4
    check_parity(source, lowered, tmp_path)


def test_rotary_part_that_the_fused_rotary_takes(tmp_path: Path) -> None:
    rotary = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    source = loaded("phi3", tmp_path, hidden_size=192, rope_parameters=rotary)
    lowered = lower(source.model)
    assert count(lowered)["RotaryEmbedding"] == 0
    check_parity(source, lowered, tmp_path)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_lowered_graph_of_other_families_equals_eager_model(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    lowered = lower(source.model)
    assert count(lowered)["GroupQueryAttention"] == 2
    check_parity(source, lowered, tmp_path)


def test_rotary_tables_that_are_not_indexed_by_position(tmp_path: Path) -> None:
    # LongRoPE switches tables beyond the original length, which is crossed here.
    source = loaded(
        "phi3",
        tmp_path,
        max_position_embeddings=32,
        original_max_position_embeddings=8,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 8,
            "long_factor": [1.5] * 8,
            "original_max_position_embeddings": 8,
        },
    )
    lowered = lower(source.model)
    assert count(lowered)["RotaryEmbedding"] == 4
    check_parity(source, lowered, tmp_path)


def test_attention_of_unknown_mask_is_left_alone(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    first = next(node for node in source.model.graph if node.op_type == "Attention")
    del first.metadata_props[WINDOW_KEY]
    lowered = lower(source.model)
    assert count(lowered)["Attention"] == count(lowered)["GroupQueryAttention"] == 1
    assert "position_ids" in {value.name for value in lowered.graph.inputs}
    check_parity(source, lowered, tmp_path)


@pytest.mark.parametrize("family", ["llama", "llama_bias", "qwen2", "qwen3", "gemma3", "phi3"])
def test_packed_projections(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    PackProjections().call(source.model)
    lowered = lower(source.model)
    attention = next(node for node in lowered.graph if node.op_type == "GroupQueryAttention")
    # Norms of q and k stand between the split and the attention.
    assert (attention.inputs[1] is None) == (family not in {"qwen3", "gemma3"})
    check_parity(source, lowered, tmp_path)


def test_parts_in_another_order_are_not_fed_packed(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path).model
    PackProjections().call(model)
    split = next(node for node in model.graph if node.op_type == "Split")
    attention = next(node for node in model.graph if node.op_type == "Attention")
    attention.replace_input_with(2, split.outputs[1])
    fused = next(node for node in lower(model).graph if node.op_type == "GroupQueryAttention")
    assert [value.name for value in fused.inputs[:3] if value is not None] == [
        split.outputs[index].name for index in (0, 1, 1)
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama_bias", "gemma3", "phi3"])
def test_compressed_graph_without_any_library(family: str, tmp_path: Path, *, packed: bool) -> None:
    source = loaded(family, tmp_path)
    if packed:
        PackProjections().call(source.model)
    rng = np.random.default_rng(23)
    weights = {}
    for index, linear in enumerate(find_linears(source.model)):
        _compress(linear, rng, bits=(2, 3, 4, 6, 8)[index % 5], rank=(0, None, 3)[index % 3])
        weights[linear.name] = linear.effective_weight()
    check(source.model, Stage.COMPRESSED, after="compress")
    check_parity(source, lower(source.model), tmp_path, load_eager(source.folder, weights))


def _compress(linear: Any, rng: np.random.Generator, *, bits: int, rank: int | None) -> None:  # noqa: ANN401
    """Round to the nearest code of a grid per group, with random factors."""
    weight = linear.weight()
    size, groups = 24, -(-weight.shape[1] // 24)
    padded = np.pad(weight, ((0, 0), (0, groups * size - weight.shape[1])))
    grouped = padded.reshape(len(weight), groups, size)
    scales = (np.ptp(grouped, axis=2) / (2**bits - 1)).astype(np.float16)
    zeros = np.clip(np.rint(-grouped.min(axis=2) / scales), 0, 2**bits - 1)
    codes = np.rint(grouped / scales[..., None]) + zeros[..., None]
    codes = np.clip(codes, 0, 2**bits - 1).reshape(padded.shape)[:, : weight.shape[1]]
    linear.quantize(
        NBitsWeight.from_codes(
            codes.astype(np.uint8), scales, zeros.astype(np.uint8), bits=bits, group_size=size
        )
    )
    if rank is not None:
        lora_a, lora_b = (
            (0.1 * rng.standard_normal(shape)).astype(np.float16)
            for shape in ((rank, weight.shape[1]), (weight.shape[0], rank))
        )
        linear.compensate(LowRank(lora_a=lora_a, lora_b=lora_b))


def test_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = tiny_model("gemma3", tmp_path / "model")
    texts = []
    for run in ("first", "second"):
        model = load(str(folder), work=tmp_path / run).model
        _compress(find_linears(model)[0], np.random.default_rng(1), bits=3, rank=2)
        texts.append(ir.to_proto(lower(model)).SerializeToString(deterministic=True))
    assert texts[0] == texts[1]
    assert str(tmp_path).encode() not in texts[0]
