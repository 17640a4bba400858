from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

from eoracc.compiler.frontend import load as frontend
from eoracc.errors import ModelError, PassError
from eoracc.passes.graph import spec
from eoracc.passes.graph.linears import Factorized, Linear, find_again, find_linears
from eoracc.passes.solvers.grid import find_grid, quantize, to_nbits
from eoracc.plugins.op import FUSED_OP
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.plugins.operands.weight import NBitsWeight
from tests.plugins.banks import random_typed_factors
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

SEPARATE = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED_MLP = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"]


def load(folder: Path, family: str = "llama") -> ir.Model:
    return frontend.load(str(tiny_model(family, folder / "model")), work=folder).model


def rounded(weight: NDArray[np.float32], bits: int = 4, *, symmetric: bool = False) -> NBitsWeight:
    grid = find_grid(
        weight, bits=bits, group_size=16, symmetric=symmetric, importance=None, clip_search=False
    )
    return to_nbits(quantize(weight, grid), grid)


def factors(linear: Linear, rank: int) -> LowRank:
    rng = np.random.default_rng(rank)
    return LowRank(
        lora_a=rng.standard_normal((rank, linear.in_features)).astype(np.float16),
        lora_b=rng.standard_normal((linear.out_features, rank)).astype(np.float16),
    )


def operands(linear: Linear) -> dict[str, NDArray[np.generic]]:
    """Initializers that the linear's node reads."""
    return {
        str(value.name): value.const_value.numpy()
        for value in linear.node.inputs[1:]
        if value is not None and value.const_value is not None
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_finds_the_linears_of_every_family(family: str, tmp_path: Path) -> None:
    model = load(tmp_path, family)
    linears = find_linears(model)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    roles = FUSED_MLP if family == "phi3" else SEPARATE
    assert [linear.role for linear in linears] == [*roles, *roles, "lm_head"]
    blocks = [0] * len(roles) + [1] * len(roles)
    assert [linear.block for linear in linears] == [*blocks, None]
    tied = FAMILIES[family][1]["tie_word_embeddings"]
    for linear in linears:
        name = "model.embed_tokens" if tied and linear.role == "lm_head" else linear.name
        weight = linear.weight()
        assert weight.shape == (linear.out_features, linear.in_features)
        assert weight.dtype == np.float32
        assert weight.flags.c_contiguous
        if f"{name}.weight" in stored:  # Phi-3 stores its projections fused
            np.testing.assert_array_equal(weight, stored[f"{name}.weight"])
        np.testing.assert_array_equal(linear.effective_weight(), weight)
    assert linears[-1].out_features == VOCABULARY


def test_quantize_and_compensate_write_through(tmp_path: Path) -> None:
    model = load(tmp_path)
    graph = model.graph
    linear = find_linears(model)[6]
    before = set(graph.initializers)
    original = linear.weight()
    users = [use.node.op_type for use in linear.node.outputs[0].uses()]
    weight = rounded(original)
    linear.quantize(weight)
    parts = {f"{linear.name}.{part}" for part in ("weight_packed", "scales", "zero_points")}
    assert set(graph.initializers) - before == parts
    (dropped,) = before - set(graph.initializers)
    assert dropped.startswith(f"{linear.name}.weight")
    assert linear.node.op_type == FUSED_OP
    assert [use.node.op_type for use in linear.node.outputs[0].uses()] == users
    spec.check(model, spec.Stage.COMPRESSED, after="the test")
    np.testing.assert_array_equal(linear.weight(), original)

    low_rank = factors(linear, 3)
    linear.compensate(low_rank)
    spec.check(model, spec.Stage.COMPRESSED, after="the test")
    expected = weight.dequantize() + low_rank.product()
    np.testing.assert_array_equal(linear.effective_weight(), expected)
    np.testing.assert_array_equal(linear.backbone_weight(), weight.dequantize())
    (found,) = [one for one in find_linears(model) if one.name == linear.name]
    assert found.source is None
    np.testing.assert_array_equal(found.effective_weight(), expected)


def test_int4_factors_write_through(tmp_path: Path) -> None:
    """The graph holds them in a type of their own, the view as small integers."""
    model = load(tmp_path)
    linear = find_linears(model)[0]
    linear.quantize(rounded(linear.weight()))
    shape = (linear.out_features, linear.in_features)
    factors = random_typed_factors(np.random.default_rng(1), shape, rank=3, factor_type="int4")
    linear.compensate(factors)
    spec.check(model, spec.Stage.COMPRESSED, after="the test")
    assert [str(value.dtype) for value in linear.node.inputs[5:7] if value] == ["INT4", "INT4"]
    (found,) = [one for one in find_linears(model) if one.name == linear.name]
    assert found.factors is not None
    assert found.factors.factor_type == "int4"
    assert found.factors.lora_a.dtype == np.int8
    np.testing.assert_array_equal(found.effective_weight(), linear.effective_weight())


def test_writing_twice_leaves_what_was_written_last(tmp_path: Path) -> None:
    model = load(tmp_path)
    linear = find_linears(model)[0]
    weight = linear.weight()
    linear.quantize(rounded(weight, bits=3))
    linear.compensate(factors(linear, 5))
    # Symmetric codes have no zero points, and the second factors another rank.
    symmetric, low_rank = rounded(weight, bits=8, symmetric=True), factors(linear, 2)
    linear.quantize(symmetric)
    linear.compensate(low_rank)
    spec.check(model, spec.Stage.COMPRESSED, after="the test")
    stored = operands(linear)
    own = {name for name in model.graph.initializers if name.startswith(f"{linear.name}.")}
    assert (
        own
        == set(stored)
        == {f"{linear.name}.{part}" for part in ("weight_packed", "scales", "lora_a", "lora_b")}
    )
    np.testing.assert_array_equal(stored[f"{linear.name}.weight_packed"], symmetric.packed)
    np.testing.assert_array_equal(stored[f"{linear.name}.lora_a"], low_rank.lora_a)
    assert linear.node.attributes["bits"].as_int() == 8
    linear.compensate(None)
    assert not {name for name in model.graph.initializers if "lora" in name}
    np.testing.assert_array_equal(linear.effective_weight(), symmetric.dequantize())
    assert sum(node.op_type == FUSED_OP for node in model.graph) == 1


def test_tied_head_leaves_the_embedding_alone(tmp_path: Path) -> None:
    model = load(tmp_path, "smollm")
    table = "model.embed_tokens.weight"
    head = find_linears(model)[-1]
    assert head.name == "lm_head"
    head.quantize(rounded(head.weight(), bits=8))
    spec.check(model, spec.Stage.COMPRESSED, after="the test")
    assert [use.node.op_type for use in model.graph.initializers[table].uses()] == ["Gather"]
    assert not [node for node in model.graph if node.op_type == "Transpose"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_damaged_weight_is_named_when_it_is_read(tmp_path: Path, value: float) -> None:
    path = tiny_model("llama", tmp_path / "model") / "model.safetensors"
    arrays = load_file(path)
    arrays["model.layers.1.self_attn.k_proj.weight"][3, 5] = value
    save_file(arrays, path, metadata={"format": "pt"})
    linears = find_linears(frontend.load(str(path.parent), work=tmp_path).model)
    with pytest.raises(ModelError, match=r"^model\.layers\.1\.self_attn\.k_proj\.weight holds NaN"):
        linears[8].weight()


def test_misuse_is_named(tmp_path: Path) -> None:
    linears = find_linears(load(tmp_path))
    first, last = linears[0], linears[6]
    with pytest.raises(PassError, match="is not compressed: there is nothing to compensate"):
        first.compensate(factors(first, 1))
    with pytest.raises(PassError, match=r"a \[48, 88\] weight cannot replace \[96, 48\]"):
        first.quantize(rounded(last.weight()))
    first.source = None
    with pytest.raises(PassError, match="was loaded compressed: its weight is gone"):
        first.weight()


# --- products of two ------------------------------------------------------------------------------


def product(linear: Linear, rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    rng = np.random.default_rng(rank)
    return (
        rng.standard_normal((linear.out_features, rank), np.float32),
        rng.standard_normal((rank, linear.in_features), np.float32),
    )


def test_factors_are_found_again_as_linears_that_know_their_weight(tmp_path: Path) -> None:
    model = load(tmp_path, "qwen2")
    before = find_linears(model)
    whole = before[3]
    u, v = product(whole, 7)
    output, read = whole.node.outputs[0].name, whole.input.name
    whole.factorize(u, v)
    spec.check(model, spec.Stage.COMPRESSED, after="a test")
    np.testing.assert_array_equal(whole.effective_weight(), u @ v)
    assert f"{whole.name}.weight" not in model.graph.initializers
    after = find_again(model, before)
    names = [linear.name for linear in before]
    names[3:4] = [f"{whole.name}.v", f"{whole.name}.u"]
    assert [linear.name for linear in after] == names
    assert all(any(linear is old for old in before) for linear in after if linear.whole is None)
    first, second = after[3:5]
    assert first.whole is second.whole is whole
    assert (first.role, second.role) == ("o_proj.v", "o_proj.u")
    assert first.known_as == (first.name, whole.name)
    assert whole.known_as == (whole.name,)
    np.testing.assert_array_equal(first.weight(), v)
    np.testing.assert_array_equal(second.weight(), u)
    assert (first.input.name, second.node.outputs[0].name) == (read, output)
    assert second.input.producer() is first.node
    assert (first.out_features, second.in_features) == (7, 7)
    assert find_again(model, after) == after


def test_a_tied_head_stands_where_nothing_is_factorised(tmp_path: Path) -> None:
    head = find_linears(load(tmp_path, "smollm"))[-1]
    with pytest.raises(PassError, match=r"lm_head: stands outside the decoder blocks"):
        head.factorize(*product(head, 2))


def test_factors_that_cannot_take_a_weights_place(tmp_path: Path) -> None:
    model = load(tmp_path)
    linears = find_linears(model)
    one, other, third = linears[:3]
    u, v = product(one, 3)
    with pytest.raises(PassError, match=r"factors \[96, 3\] and \[4, 48\] cannot replace"):
        one.factorize(u, np.vstack([v, v[:1]]))
    with pytest.raises(PassError, match="its factors hold NaN or Inf"):
        one.factorize(u * np.float32(np.nan), v)
    assert one.factorized is None
    one.factorize(u, v)
    with pytest.raises(PassError, match="is compressed already"):
        one.factorize(u, v)
    with pytest.raises(PassError, match="put another 'calibrate' before the pass that quantizes"):
        one.quantize(rounded(one.effective_weight()))
    other.quantize(rounded(other.weight()))
    with pytest.raises(PassError, match="is compressed already"):
        other.factorize(*product(other, 3))
    first = find_again(model, linears)[0]
    with pytest.raises(PassError, match=r"q_proj\.v: is a factor already"):
        first.factorize(*product(first, 2))
    assert third.factorized is None


def test_factors_can_be_held_elsewhere(tmp_path: Path) -> None:
    model = load(tmp_path)
    linears = find_linears(model)
    u, v = product(linears[0], 3)
    linears[0].factorize(u, v)
    linears[0].hold_factors(Factorized(u.copy(order="F"), v.copy(order="F")))
    first, second = find_again(model, linears)[:2]
    np.testing.assert_array_equal(second.weight() @ first.weight(), u @ v)
    assert linears[0].factorized is not None
    assert np.shares_memory(
        operands(second)[f"{linears[0].name}.u.weight"], linears[0].factorized.u
    ), "held once"


def test_errors_between_the_factors_count_for_what_u_makes_of_them(tmp_path: Path) -> None:
    model = load(tmp_path)
    linears = find_linears(model)
    whole, other = linears[:2]
    rng = np.random.default_rng(4)
    root = rng.standard_normal((96, 96), np.float32)
    whole.output_gram = lambda: root @ root.T
    whole.token_weights = lambda: np.ones(3, np.float32)
    whole.plan["bits"] = 2
    for linear in (whole, other):
        linear.factorize(*product(linear, 3))
    first, second, *others = find_again(model, linears)[:4]
    error = rng.standard_normal(3, np.float32)
    assert first.output_gram is not None
    assert second.output_gram is whole.output_gram
    assert first.token_weights is second.token_weights is whole.token_weights
    lost = root.T @ second.weight() @ error
    weighed = error @ first.output_gram() @ error
    assert weighed == pytest.approx(lost @ lost, rel=96 * 2.0**-20)
    assert [one.output_gram for one in others] == [None, None]
    assert first.plan == second.plan == {}
