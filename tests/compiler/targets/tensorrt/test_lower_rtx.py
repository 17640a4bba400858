"""The graph for TensorRT: as its float32 twin in ONNX Runtime, against eager PyTorch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from eoracc.compiler.eager.model import load_eager, reference_logits, replace_weights
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.targets.tensorrt.lower_rtx import lower
from eoracc.errors import ModelError, PassError
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.spec import Stage, check
from eoracc.passes.pack_projections import PackProjections
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.runtime.onnxruntime.graph_session import GraphSession
from tests.graph_session import assert_close, padded_mask
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

LENGTHS = (12, 8, 5)
TOKENS = 12
CAPACITY = 16
LEFT, RIGHT = (padded_mask(LENGTHS, TOKENS, left=left) for left in (True, False))
CALLS: Sequence[tuple[NDArray[np.int64] | None, tuple[int, ...]]] = (
    (None, (TOKENS,)),
    (None, (8, 1, 1, 1, 1)),
    (None, (7, 5)),
    (LEFT, (TOKENS,)),
    (LEFT, (7, 1, 4)),
    (RIGHT, (TOKENS,)),
)
CACHES: Mapping[str, dict[str, Any]] = {
    "concat": {},
    "in_place": {"cache": "in_place", "capacity": CAPACITY},
}


def tokens() -> NDArray[np.int64]:
    return np.random.default_rng(17).integers(3, VOCABULARY, (len(LENGTHS), TOKENS))


def loaded(family: str, work: Path, **overrides: Any) -> LoadedModel:  # noqa: ANN401
    return load(str(tiny_model(family, work / "model", **overrides)), work=work)


def rounded_eager(
    source: LoadedModel, weights: Mapping[str, NDArray[np.float32]], dtype: torch.dtype
) -> Any:  # noqa: ANN401 - a transformers model
    """The eager model in float32, its matrices and biases rounded, then ``weights`` put in."""
    model = load_eager(source.folder, {})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Cohere's norms have a weight for each head.
            if (parameter.ndim == 2 and "norm" not in name) or name.endswith("bias"):
                parameter.copy_(parameter.to(dtype).float())
    replace_weights(model, weights)
    return model


def session(lowered: ir.Model, work: Path, *, rounded: bool = False) -> GraphSession:
    check(lowered, Stage.TENSORRT_RTX, after="lower")
    path = work / "model.onnx"
    ir.save(lowered, path, external_data="model.onnx.data")
    return GraphSession.open(path, rounded=rounded, threads=1)


def check_parity(source: LoadedModel, run: GraphSession, eager: Any) -> None:  # noqa: ANN401
    """Prefill, decoding, a chunk on a cache, and rows padded on either side."""
    for mask, chunks in CALLS:
        expected = reference_logits(eager, tokens(), mask, chunks=chunks)
        valid = np.ones_like(tokens()) if mask is None else mask
        actual = run.run_chunks(tokens(), valid, chunks)
        assert_close(actual, expected, source.config, mask)


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


@pytest.mark.parametrize("family", FAMILIES)
def test_uncompressed_graph_equals_eager_model(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    eager = rounded_eager(source, {}, torch.float16)
    for options in CACHES.values():
        lowered = lower(source.model, **options)
        assert count(lowered)["Attention"] == 2
        check_parity(source, session(lowered, tmp_path), eager)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("cohere_norms", {}),
        ("cohere2", {}),
        ("glm", {}),
        ("olmo", {}),
        ("llama", {"head_dim": 100}),
        ("gemma3", {"final_logit_softcapping": 2.0}),
    ],
)
def test_other_attentions_equal_the_eager_model(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    source = loaded(family, tmp_path, **fields)
    lowered = lower(source.model)
    # TensorRT for RTX does not build an interleaved rotation.
    rotaries = [node for node in lowered.graph if node.op_type == "RotaryEmbedding"]
    assert not any(node.attributes.get_int("interleaved", 0) for node in rotaries)
    check_parity(source, session(lowered, tmp_path), rounded_eager(source, {}, torch.float16))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_tables_end_with_the_positions_that_calls_have(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    whole, cut = (lower(source.model, positions=length) for length in (None, TOKENS))

    def tables(model: ir.Model) -> list[int]:
        return [
            len(value.const_value.numpy())
            for name, value in model.graph.initializers.items()
            if "_cache" in name and value.const_value is not None
        ]

    assert min(tables(whole)) > TOKENS
    assert tables(cut) == [TOKENS] * len(tables(whole))
    check_parity(source, session(cut, tmp_path), rounded_eager(source, {}, torch.float16))


FORMS: Mapping[str, dict[str, Any]] = {
    "int4_symmetric": {"bits": 4, "symmetric": True},
    "int4_zeros": {"bits": 4, "factors": "int8"},
    "int3_zeros": {"bits": 3, "factors": "int4"},
    "int2_symmetric": {"bits": 2, "symmetric": True, "factors": "int8"},
    "int8_symmetric": {"bits": 8, "symmetric": True, "factors": "int4"},
    "int8_zeros": {"bits": 8},
    "int4_odd_groups": {"bits": 4, "group_size": 40},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama_bias", "gemma3"])
def test_compressed_graph_equals_eager_model(family: str, form: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    weights = compress(source.model, **FORMS[form])
    check(source.model, Stage.COMPRESSED, after="compress")
    eager = rounded_eager(source, weights, torch.float16)
    for options in CACHES.values():
        check_parity(source, session(lower(source.model, **options), tmp_path), eager)


@pytest.mark.parametrize("family", ["phi3", "qwen3"])
def test_packed_projections(family: str, tmp_path: Path) -> None:
    source = loaded(family, tmp_path)
    PackProjections().call(source.model)
    weights = compress(source.model, bits=4)
    eager = rounded_eager(source, weights, torch.float16)
    check_parity(source, session(lower(source.model), tmp_path), eager)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("family", ["gemma3", "smollm"])
def test_tied_table_and_head_are_stored_once(
    family: str, tmp_path: Path, *, symmetric: bool
) -> None:
    source = loaded(family, tmp_path, vocab_size=VOCABULARY + 1)
    weights = compress(source.model, bits=4, symmetric=symmetric, rank=None)
    (table,), head = find_embeddings(source.model), find_linears(source.model)[-1]
    weight = head.quantized
    assert weight is not None
    table.quantize(weight, tied=head)
    weights[table.name] = weight.dequantize()
    lowered = lower(source.model)
    width = source.config.hidden_size
    tables = [
        value
        for value in lowered.graph.initializers.values()
        if value.shape is not None and list(value.shape) == [VOCABULARY + 1, width]
    ]
    assert [value.dtype for value in tables] == [ir.DataType.INT4]
    eager = rounded_eager(source, weights, torch.float16)
    check_parity(source, session(lowered, tmp_path), eager)


def test_factorized_linears(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    rng = np.random.default_rng(3)
    weights = {}
    for linear in find_linears(source.model)[:-1]:
        u = 0.2 * rng.standard_normal((linear.out_features, 12)).astype(np.float32)
        v = 0.2 * rng.standard_normal((12, linear.in_features)).astype(np.float32)
        linear.factorize(u, v)
    weights = compress(source.model, bits=4, symmetric=True)
    assert "model.layers.0.mlp.down_proj.v" in weights
    eager = rounded_eager(source, weights, torch.float16)
    check_parity(source, session(lower(source.model), tmp_path), eager)


@pytest.mark.parametrize("rank", [0, 1, 16])
def test_adapters_are_inputs(rank: int, tmp_path: Path) -> None:
    source = loaded("qwen2", tmp_path)
    linears = find_linears(source.model)
    weights = compress(source.model, bits=4)
    run = session(lower(source.model, adapter_type="float16"), tmp_path)
    rng = np.random.default_rng(rank)
    factors: dict[str, NDArray[np.float32]] = {}
    for linear in linears[:-1]:
        a = rng.standard_normal((rank, linear.in_features)).astype(np.float32)
        b = rng.standard_normal((linear.out_features, rank)).astype(np.float32) / np.float32(10)
        factors |= {f"{linear.name}.lora_a": a, f"{linear.name}.lora_b": b}
        weights[linear.name] += b @ a
    inputs = {value.name for value in lower(source.model, adapter_type="float16").graph.inputs}
    assert set(factors) == {name for name in inputs if str(name).endswith(("lora_a", "lora_b"))}
    eager = rounded_eager(source, weights, torch.float16)
    before = run.run_chunks(tokens(), np.ones_like(tokens()), (TOKENS,))
    run.operands = factors
    check_parity(source, run, eager)
    after = run.run_chunks(tokens(), np.ones_like(tokens()), (TOKENS,))
    assert bool(np.abs(after - before).max() > 0.1) == (rank > 0)


def test_what_bfloat16_rounds_is_in_the_reference(tmp_path: Path) -> None:
    source = loaded("llama_bias", tmp_path)
    compress(source.model, bits=4, scale_dtype=np.float32)
    bfloat16 = ir.DataType.BFLOAT16.numpy()

    def rounded(array: Any) -> NDArray[np.float32]:  # noqa: ANN401
        return np.asarray(array).astype(bfloat16).astype(np.float32)

    weights = {}
    for linear in find_linears(source.model):
        assert linear.quantized is not None
        scales = rounded(linear.quantized.scales)
        weights[linear.name] = replace(linear.quantized, scales=scales).dequantize()
        if linear.factors is not None:
            low_rank = rounded(linear.factors.lora_b) @ rounded(linear.factors.lora_a)
            weights[linear.name] += low_rank
    eager = rounded_eager(source, weights, torch.bfloat16)
    check_parity(source, session(lower(source.model, dtype="bfloat16"), tmp_path), eager)


def test_rounding_of_a_gpu_is_seen_and_small(tmp_path: Path) -> None:
    """Float16 leaves 2^-11 a value: far above what the twin leaves, far below the signal."""
    source = loaded("llama", tmp_path)
    eager = rounded_eager(source, {}, torch.float16)
    expected = reference_logits(eager, tokens())
    run = session(lower(source.model), tmp_path, rounded=True)
    error = np.abs(run.run_chunks(tokens(), np.ones_like(tokens()), (TOKENS,)) - expected)
    assert 2.0**-13 < error.max() < 30 * 2.0**-11 * np.abs(expected).max()


def test_rows_of_a_cache_in_place_have_places_of_their_own(tmp_path: Path) -> None:
    """Unequal prompts, then a token each: no padding stands between, and nothing old is seen."""
    source = loaded("mistral", tmp_path)
    eager = rounded_eager(source, {}, torch.float16)
    lowered = lower(source.model, cache="in_place", capacity=CAPACITY)
    run = session(lowered, tmp_path)
    ids, lengths = tokens(), np.array([9, 6, 3])
    calls = [(ids[:, :9], lengths, np.zeros(3, np.int64))]
    last = ids[np.arange(3), lengths][:, None]
    calls.append((last, lengths + 1, lengths))
    logits = run_in_place(run, calls)
    for row, length in enumerate(lengths):
        alone = reference_logits(eager, np.append(ids[row, :length], last[row])[None])
        expected = np.tile(alone[:, -1:], (1, TOKENS, 1))
        assert_close(logits[None, row], expected[:, :1], source.config)


def run_in_place(run: GraphSession, calls: Sequence[Any]) -> NDArray[np.float32]:
    """Logits of each row's last token after ``calls`` of (ids, lengths, write indices)."""
    inference = run._inference
    shapes = {v.name: v.shape for v in inference.get_inputs() if v.name.startswith("past")}
    cache = {name: np.zeros((3, *shape[1:]), np.float32) for name, shape in shapes.items()}
    outputs = [value.name for value in inference.get_outputs()]
    logits = np.zeros(0, np.float32)
    for ids, lengths, places in calls:
        total = int((places + ids.shape[1]).max())
        feeds = {
            "input_ids": ids,
            "attention_mask": (np.arange(total) < lengths[:, None]).astype(np.int64),
            "position_ids": places[:, None] + np.arange(ids.shape[1]),
            "write_indices": places,
            "logits_positions": (lengths - places - 1)[:, None],
        }
        results = dict(zip(outputs, inference.run(None, feeds | cache), strict=True))
        logits = results["logits"]
        cache = {name: results[name.replace("past_key_values", "present")] for name in cache}
    return logits


def test_inputs_and_outputs_are_those_of_the_docs(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    graph = lower(source.model).graph
    cache = [f"{block}.{kind}" for block in (0, 1) for kind in ("key", "value")]
    half, integer = ir.DataType.FLOAT16, ir.DataType.INT64
    described = {
        str(value.name): (value.dtype, [str(size) for size in value.shape or ()])
        for value in (*graph.inputs, *graph.outputs)
    }
    assert described == {
        "input_ids": (integer, ["batch", "sequence"]),
        "attention_mask": (integer, ["batch", "total"]),
        "position_ids": (integer, ["batch", "sequence"]),
        "logits_positions": (integer, ["batch", "logits"]),
        "logits": (ir.DataType.FLOAT, ["batch", "logits", str(VOCABULARY)]),
        **{f"past_key_values.{name}": (half, ["batch", "2", "past", "16"]) for name in cache},
        **{f"present.{name}": (half, ["batch", "2", "total", "16"]) for name in cache},
    }
    in_place = lower(source.model, cache="in_place", capacity=CAPACITY).graph
    shapes = {str(value.name): value.shape for value in (*in_place.inputs, *in_place.outputs)}
    assert [str(size) for size in shapes["write_indices"] or ()] == ["batch"]
    for name in ("past_key_values.1.value", "present.1.value"):
        assert [str(size) for size in shapes[name] or ()] == ["batch", "2", "16", "16"]


def test_source_graph_stays_as_it_is(tmp_path: Path) -> None:
    source = loaded("gemma3", tmp_path)
    compress(source.model, bits=4)
    before = ir.to_proto(source.model).SerializeToString(deterministic=True)
    lower(source.model, adapter_type="float16")
    assert ir.to_proto(source.model).SerializeToString(deterministic=True) == before


def test_same_graph_gives_the_same_bytes(tmp_path: Path) -> None:
    source = loaded("gemma3", tmp_path)
    compress(source.model, bits=4)
    first, second = (
        ir.to_proto(lower(source.model)).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second
    assert str(tmp_path).encode() not in first


def test_weights_of_4_bits_take_4_bits(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    compress(source.model, bits=3, rank=None)
    weights = [
        value.const_value
        for value in lower(source.model).graph.initializers.values()
        if value.dtype == ir.DataType.INT4
    ]
    assert sum(one.nbytes for one in weights if one is not None) == sum(
        linear.in_features * linear.out_features // 2 for linear in find_linears(source.model)
    )


def test_a_scale_beyond_float16_is_refused(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    linear = find_linears(source.model)[0]
    scales = np.full((linear.out_features, 3), 1e5, np.float32)
    codes = np.zeros((linear.out_features, linear.in_features), np.uint8)
    linear.quantize(NBitsWeight.from_codes(codes, scales, None, bits=4, group_size=16))
    with pytest.raises(ModelError, match=r"q_proj: a scale holds 1e\+05.* dtype bfloat16"):
        lower(source.model)
    lower(source.model, dtype="bfloat16")


def test_a_weight_beyond_float16_is_refused(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    value = source.model.graph.initializers["model.layers.1.mlp.up_proj.weight_t"]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.full(value.const_value.shape.numpy(), 7e4, np.float32))
    with pytest.raises(ModelError, match=r"up_proj.* holds 7e\+04, which is beyond float16"):
        lower(source.model)


def test_attention_that_caps_scores_is_refused(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    node = next(node for node in source.model.graph if node.op_type == "Attention")
    node.attributes.add(ir.AttrFloat32("softcap", 30.0))
    with pytest.raises(PassError, match=r"caps its scores .*: take the target out"):
        lower(source.model)


def test_attention_of_another_kind_is_refused(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    node = next(node for node in source.model.graph if node.op_type == "Attention")
    node.attributes.add(ir.AttrInt64("is_causal", 0))
    with pytest.raises(PassError, match="causal attention over a key/value cache only"):
        lower(source.model)


def test_a_tiled_graph_is_refused(tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    compress(source.model, bits=4)
    node = next(node for node in source.model.graph if node.domain == "eoracc")
    node.attributes.add(ir.AttrInt64("layout", 1))
    with pytest.raises(PassError, match="is tiled or fused"):
        lower(source.model)


@pytest.mark.parametrize(
    "options",
    [{"cache": "in_place"}, {"capacity": 8}, {"dtype": "bfloat16", "adapter_type": "float16"}],
)
def test_options_must_agree(options: dict[str, Any], tmp_path: Path) -> None:
    source = loaded("llama", tmp_path)
    with pytest.raises(ValueError, match=r"capacity|bfloat16 graph"):
        lower(source.model, **options)


def compress(
    model: ir.Model,
    *,
    bits: int,
    symmetric: bool = False,
    group_size: int = 16,
    factors: str = "float16",
    rank: int | None = 3,
    scale_dtype: Any = np.float16,  # noqa: ANN401 - a NumPy type
) -> dict[str, NDArray[np.float32]]:
    """Round every linear to random grids, with random factors; what each then multiplies with."""
    rng = np.random.default_rng(23)
    weights = {}
    for index, linear in enumerate(find_linears(model)):
        codes, scales, zeros = _round(linear.weight(), bits, group_size, symmetric=symmetric)
        linear.quantize(
            NBitsWeight.from_codes(
                codes, scales.astype(scale_dtype), zeros, bits=bits, group_size=group_size
            )
        )
        if rank is not None and index % 3:
            # Rank 0 is a compensation that was found to be worth nothing.
            made = _factors(rng, linear, rank if index % 3 == 1 else 0, factors)
            linear.compensate(made)
        weights[linear.name] = linear.effective_weight()
    return weights


def _round(
    weight: NDArray[np.float32], bits: int, size: int, *, symmetric: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None]:
    rows, columns = weight.shape
    groups, half = -(-columns // size), 2 ** (bits - 1)
    padded = np.pad(weight, ((0, 0), (0, groups * size - columns)))
    grouped = padded.reshape(rows, groups, size)
    if symmetric:
        scales = np.abs(grouped).max(axis=2) / half
        zeros = np.full(scales.shape, half)
    else:
        scales = np.ptp(grouped, axis=2) / (2**bits - 1)
        zeros = np.clip(np.rint(-grouped.min(axis=2) / scales), 0, 2**bits - 1)
    codes = np.rint(grouped / scales[..., None]) + zeros[..., None]
    codes = np.clip(codes, 0, 2**bits - 1).reshape(padded.shape)[:, :columns]
    return codes.astype(np.uint8), scales, None if symmetric else zeros.astype(np.uint8)


def _factors(rng: np.random.Generator, linear: Any, rank: int, kind: str) -> LowRank:  # noqa: ANN401
    shapes = (rank, linear.in_features), (linear.out_features, rank)
    if kind == "float16":
        a, b = ((0.1 * rng.standard_normal(shape)).astype(np.float16) for shape in shapes)
        return LowRank(lora_a=a, lora_b=b)
    bits, largest = {"int8": (8, 127), "int4": (4, 7)}[kind]
    codes = [rng.integers(-largest, largest + 1, shape).astype(np.int8) for shape in shapes]
    # In float16 without rounding: the reference has them as they are.
    a_scale, b_scale = (
        (0.2 / largest * (1 + rng.random(len(one)))).astype(np.float16).astype(np.float32)
        for one in codes
    )
    return LowRank(
        lora_a=codes[0], lora_b=codes[1], lora_a_scale=a_scale, lora_b_scale=b_scale, bits=bits
    )
