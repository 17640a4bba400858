"""What a lowered block consists of, and that every fusion leaves the logits as they were."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import Linear, LinearGroup, find_again, find_linears
from eoracc.passes.graph.spec import Stage, check
from eoracc.passes.graph.tensors import register_tensor
from eoracc.passes.pack_projections import PackProjections
from eoracc.passes.quantize.embedding_tables import quantize_embedding_tables
from eoracc.passes.quantize.quantization import QuantizeOverride
from eoracc.passes.quantize.quantize_rtn import QuantizeRtn
from eoracc.plugins.adapters import SLOTS_KEY, AdapterSlots
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from eoracc.runtime.artifact.graph_names import LINEARS_KEY
from tests.graph_session import GraphSession, assert_close, padded_mask
from tests.plugins.banks import random_typed_factors
from tests.plugins.fused_op import random_int8_factors
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = 160
TABLES = {
    name: QuantizeOverride(bits=8, group_size=16, symmetric=True)
    for name in ("lm_head", "*embed_tokens")
}


def compressed(
    family: str,
    work: Path,
    *,
    packed: bool = False,
    **overrides: Any,  # noqa: ANN401 - fields of any configuration
) -> tuple[LoadedModel, list[Linear]]:
    """A model whose widths are whole tiles, in 4 bits, head and table in 8."""
    fields = {"intermediate_size": 96, "vocab_size": VOCABULARY} | overrides
    source = load(str(tiny_model(family, work / "model", **fields)), work=work)
    if packed:
        PackProjections().call(source.model)
    linears = find_linears(source.model)
    tables = find_embeddings(source.model)
    quantize = QuantizeRtn(bits=4, group_size=16, overrides=TABLES)
    rng = np.random.default_rng(3)
    for linear in linears:
        quantize.call(LinearGroup((linear,)))
        if linear.block is not None:
            linear.compensate(factors(rng, linear, 5))
    quantize_embedding_tables(quantize, tables, linears)
    return source, linears


def factors(rng: np.random.Generator, linear: Linear, rank: int) -> LowRank:
    a, b = (
        (0.1 * rng.standard_normal(shape)).astype(np.float16)
        for shape in ((rank, linear.in_features), (linear.out_features, rank))
    )
    return LowRank(lora_a=a, lora_b=b)


def nodes(model: ir.Model, op_type: str = "MatMulNBitsLowRank") -> dict[str, ir.Node]:
    return {str(node.name): node for node in model.graph if node.op_type == op_type}


def check_parity(source: LoadedModel, linears: list[Linear], lowered: ir.Model, work: Path) -> None:
    check(lowered, Stage.ONNXRUNTIME, after="lower")
    weights = {one.name: one.effective_weight() for one in linears if one.compressed is not None}
    for table in nodes(source.model, "GatherNBits").values():
        assert table.name is not None
        head = linears[-1].compressed
        assert head is not None
        weights[table.name] = head.dequantize()
    eager = load_eager(source.folder, weights)
    session = GraphSession(lowered, work)
    ids = np.random.default_rng(5).integers(3, VOCABULARY, (3, 9))
    mask = padded_mask((9, 6, 4), 9, left=False)
    for rows, padding, chunks in [(3, mask, (9,)), (3, None, (7, 1, 1)), (1, None, (4, 5))]:
        expected = reference_logits(eager, ids[:rows], padding, chunks=chunks)
        actual = session.logits(ids[:rows], padding, chunks=chunks)
        assert_close(actual, expected, source.config, padding)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["smollm", "llama_bias", "qwen2", "qwen3", "gemma3", "phi3"])
def test_every_fusion_keeps_the_logits(family: str, tmp_path: Path, *, packed: bool) -> None:
    source, linears = compressed(family, tmp_path, packed=packed, tie_word_embeddings=True)
    check_parity(source, linears, lower(source.model), tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_block_is_five_nodes(tmp_path: Path, *, packed: bool) -> None:
    source, _ = compressed("smollm", tmp_path, packed=packed)
    lowered = lower(source.model, accuracy_level=4)
    names = [str(node.name) for node in lowered.graph]
    start = names.index("model.layers.1.self_attn.qkv_proj")
    block = list(lowered.graph)[start : names.index("model.layers.1.mlp.down_proj") + 1]
    assert [node.op_type for node in block] == [
        "MatMulNBitsLowRank",
        "GroupQueryAttention",
        *["MatMulNBitsLowRank"] * 3,
    ]
    qkv, attention, o, gate_up, down = block
    assert (attention.inputs[0], attention.inputs[1]) == (qkv.outputs[0], None)
    assert [node.inputs[9] is not None for node in (qkv, gate_up)] == [True, True]
    assert gate_up.inputs[0] is down.inputs[10] is o.outputs[0]
    assert gate_up.attributes["activation"].as_string() == "silu"
    assert tuple(gate_up.attributes["parts"].as_ints()) == (96, 96)
    assert {n.attributes["accuracy_level"].as_int() for n in nodes(lowered).values()} == {4}
    assert not {"RMSNormalization", "SkipSimplifiedLayerNormalization"} & {
        node.op_type for node in lowered.graph
    }
    assert [str(size) for size in gate_up.outputs[0].shape or ()][-1] == "96"


def test_parts_are_named_in_the_order_of_their_rows(tmp_path: Path) -> None:
    source, linears = compressed("smollm", tmp_path)
    lowered = nodes(lower(source.model))
    listed = [name for n in lowered.values() for name in n.metadata_props[LINEARS_KEY].split(",")]
    assert listed == [linear.name for linear in linears]
    qkv = lowered["model.layers.0.self_attn.qkv_proj"]
    assert tuple(qkv.attributes["parts"].as_ints()) == (96, 32, 32)
    # Each part has a tile of A and 5 columns of B, and no tile of A serves two parts.
    assert tuple(qkv.attributes["ranks"].as_ints()) == (5, 5, 5)
    assert [tuple(qkv.inputs[i].shape.numpy()) for i in (5, 6)] == [(3, 48, 16), (50, 16)]  # type: ignore[union-attr]


def test_post_norms_keep_the_residual_out(tmp_path: Path) -> None:
    """Gemma normalises what a projection gives before it is added: there is nothing to fuse."""
    source, _ = compressed("gemma3", tmp_path)
    lowered = lower(source.model)
    for name, node in nodes(lowered).items():
        fused = [len(node.inputs) > position for position in (9, 10)]
        before = name.endswith(("qkv_proj", "gate_up_proj", "lm_head"))
        assert fused == [before, False], name
    assert nodes(lowered)["model.layers.0.mlp.gate_up_proj"].attributes[
        "activation"
    ].as_string() == ("gelu_tanh")
    assert Counter(n.op_type for n in lowered.graph)["RMSNormalization"] == 2 * 4


@pytest.mark.parametrize("change", ["bits", "int8 factors", "no factors"])
def test_only_linears_that_are_stored_alike_are_merged(tmp_path: Path, change: str) -> None:
    source, linears = compressed("smollm", tmp_path)
    query, key = linears[:2]
    assert key.compressed is not None
    if change == "bits":
        QuantizeRtn(bits=8, group_size=16).call(LinearGroup((key,)))
        key.compensate(key.factors)
    elif change == "int8 factors":
        rng = np.random.default_rng(0)
        key.compensate(random_int8_factors(rng, (key.out_features, key.in_features), rank=4))
    else:
        query.compensate(None)  # it is merged, with zeros for its factors
    lowered = lower(source.model)
    names = {name for name in nodes(lowered) if ".0.self_attn." in name and "o_proj" not in name}
    merged = {"model.layers.0.self_attn.qkv_proj"}
    apart = {f"model.layers.0.self_attn.{role}" for role in ("q_proj", "k_proj", "v_proj")}
    assert names == (merged if change == "no factors" else apart)
    check_parity(source, linears, lowered, tmp_path)


def test_widths_that_are_no_whole_tiles_stay_apart(tmp_path: Path) -> None:
    source, linears = compressed("smollm", tmp_path, intermediate_size=88)
    lowered = lower(source.model)
    assert {"model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"} <= nodes(lowered).keys()
    check_parity(source, linears, lowered, tmp_path)


def test_int8_factors(tmp_path: Path) -> None:
    source, linears = compressed("smollm", tmp_path)
    rng = np.random.default_rng(1)
    for linear in linears[:-1]:
        shape = (linear.out_features, linear.in_features)
        linear.compensate(random_int8_factors(rng, shape, rank=5))
    check(source.model, Stage.COMPRESSED, after="compress")
    again = find_linears(source.model)[0].factors
    assert again is not None
    np.testing.assert_array_equal(again.product(), linears[0].factors.product())  # type: ignore[union-attr]
    lowered = lower(source.model)
    node = nodes(lowered)["model.layers.0.self_attn.qkv_proj"]
    assert [tuple(v.shape.numpy()) for v in node.inputs[5:9] if v is not None and v.shape] == [
        (3, 12, 64),
        (20, 64),
        (48,),
        (160,),
    ]
    check_parity(source, linears, lowered, tmp_path)


@pytest.mark.parametrize("factor_type", ["float16", "int8", "int4"])
def test_ranks_of_a_nodes_parts_are_not_padded(tmp_path: Path, factor_type: str) -> None:
    """What a part stores is what a linear of its shape stores alone; rank 0 stores nothing."""
    source, linears = compressed("smollm", tmp_path)
    rng = np.random.default_rng(2)
    scattered = (8, 0, 21, 16, 5, 24, 32)
    for linear, rank in zip(linears[:-1], itertools.cycle(scattered), strict=False):
        shape = (linear.out_features, linear.in_features)
        linear.compensate(random_typed_factors(rng, shape, rank=rank, factor_type=factor_type))
    lowered = lower(source.model)
    qkv = nodes(lowered)["model.layers.0.self_attn.qkv_proj"]
    assert tuple(qkv.attributes["ranks"].as_ints()) == (8, 0, 21)
    own = [
        linear.factors.tiles() for linear in linears[:3] if linear.factors and linear.factors.rank
    ]
    for position, name in enumerate(("lora_a", "lora_b", "lora_a_scale", "lora_b_scale"), start=5):
        value = qkv.inputs[position] if position < len(qkv.inputs) else None
        assert (value is None) == (name not in own[0])
        if value is not None and value.const_value is not None:
            alone = np.concatenate([tiles[name].ravel() for tiles in own])
            np.testing.assert_array_equal(value.const_value.numpy().ravel(), alone)
    check_parity(source, linears, lowered, tmp_path)


def test_one_rank_of_whole_tiles_is_no_rank_of_a_part(tmp_path: Path) -> None:
    source, linears = compressed("smollm", tmp_path)
    rng = np.random.default_rng(2)
    for linear in linears[:-1]:
        linear.compensate(factors(rng, linear, 16))
    qkv = nodes(lower(source.model))["model.layers.0.self_attn.qkv_proj"]
    assert "ranks" not in qkv.attributes
    assert [tuple(qkv.inputs[i].shape.numpy()) for i in (5, 6)] == [(3, 48, 16), (10, 16, 16)]  # type: ignore[union-attr]


def test_tied_head_and_table_are_stored_once(tmp_path: Path) -> None:
    source, _ = compressed("smollm", tmp_path)
    lowered = lower(source.model)
    head, (table,) = nodes(lowered)["lm_head"], nodes(lowered, "GatherNBits").values()
    assert table.inputs[1:3] == head.inputs[1:3]
    ir.save(lowered, tmp_path / "model.onnx", external_data="data")
    stored = (tmp_path / "data").stat().st_size
    codes = sum(
        value.const_value.nbytes
        for name, value in lowered.graph.initializers.items()
        if value.const_value is not None
    )
    assert stored <= codes + 64 * 4096  # at most a page of padding each


def test_tiles_hold_the_weight(tmp_path: Path) -> None:
    source, linears = compressed("smollm", tmp_path)
    lowered = nodes(lower(source.model))
    qkv = lowered["model.layers.0.self_attn.qkv_proj"]
    stored = [value.const_value.numpy() for value in qkv.inputs[1:4] if value and value.const_value]
    weight = NBitsWeight.from_tiles(
        *stored, bits=4, group_size=16, out_features=160, in_features=48
    )
    parts = [one.compressed.dequantize() for one in linears[:3] if one.compressed is not None]
    np.testing.assert_array_equal(weight.dequantize(), np.concatenate(parts))


def test_logits_to_keep(tmp_path: Path) -> None:
    """One row unless asked, each row's last tokens, whatever padding follows them."""
    source, _ = compressed("smollm", tmp_path)
    session = GraphSession(lower(source.model), tmp_path)
    ids = np.random.default_rng(6).integers(3, VOCABULARY, (2, 7))
    mask = padded_mask((7, 4), 7, left=False)
    whole = session.logits(ids, mask)
    for keep in (1, 3, 7):
        kept = session.last_logits(ids, mask, keep)
        assert kept.shape == (2, keep, VOCABULARY)
        for row, length in enumerate((7, 4)):
            known = min(keep, length)
            np.testing.assert_allclose(
                kept[row, keep - known :], whole[row, length - known : length], rtol=0, atol=1e-6
            )
    assert session.last_logits(ids, mask, None).shape == (2, 1, VOCABULARY)


def test_what_broadcasts_is_no_residual(tmp_path: Path) -> None:
    source, _ = compressed("smollm", tmp_path)
    projection = nodes(source.model)["model.layers.0.self_attn.o_proj"]
    (use,) = projection.outputs[0].uses()
    shift = ir.tensor(np.ones((1, 1, 48), np.float32), name="shift")
    use.node.replace_input_with(1 - use.idx, register_tensor(source.model.graph, shift))
    lowered = lower(source.model)
    check(lowered, Stage.ONNXRUNTIME, after="lower")
    assert len(nodes(lowered)["model.layers.0.self_attn.o_proj"].inputs) < 10
    assert len(nodes(lowered)["model.layers.1.self_attn.o_proj"].inputs) == 11


@pytest.mark.parametrize("rank", [16, 12])
def test_first_factors_are_merged_where_they_are_whole_tiles(tmp_path: Path, rank: int) -> None:
    source = load(
        str(tiny_model("smollm", tmp_path / "model", vocab_size=VOCABULARY)), work=tmp_path
    )
    before = find_linears(source.model)
    rng = np.random.default_rng(8)
    for linear in before[:-1]:
        shapes = ((linear.out_features, rank), (rank, linear.in_features))
        u, v = (rng.standard_normal(shape, np.float32) / shape[1] ** 0.5 for shape in shapes)
        linear.factorize(u, v)
    linears = find_again(source.model, before)
    for linear in linears[:-1]:
        QuantizeRtn(bits=4, group_size=16).call(LinearGroup((linear,)))
        linear.compensate(factors(rng, linear, 5))
    lowered = lower(source.model, adapter_type="int8")
    found = {name: node for name, node in nodes(lowered).items() if ".0.self_attn." in name}
    attention = "model.layers.0.self_attn"
    firsts = {f"{attention}.{role}_proj.v" for role in "qkv"}
    merged = f"{attention}.qkv_proj.v"
    others = {f"{attention}.{role}_proj.u" for role in "qkvo"} | {f"{attention}.o_proj.v"}
    assert found.keys() == others | ({merged} if rank == 16 else firsts)
    if rank == 16:
        assert found[merged].metadata_props[LINEARS_KEY].split(",") == sorted(
            firsts, key=lambda name: "qkv".index(name.split(".")[-2][0])
        )
        assert found[merged].inputs[9] is not None, "the norm before it is fused"
    slots = AdapterSlots.from_json(lowered.metadata_props[SLOTS_KEY])
    assert firsts | others <= {name for slot in slots.slots for name in slot.linears}
    check_parity(source, linears, lower(source.model), tmp_path)
