from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from eoracc.compiler.targets.onnxruntime.lower import lower
from eoracc.errors import PassError
from eoracc.passes.graph.embeddings import find_embeddings
from eoracc.passes.graph.linears import find_linears
from eoracc.passes.graph.spec import Stage, check
from eoracc.plugins.op import GATHER_OP
from eoracc.plugins.operands.weight import NBitsWeight
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

RNG = np.random.default_rng(13)
IDS = RNG.integers(3, VOCABULARY, (2, 9))


def quantized(rows: int, columns: int, *, zero_points: bool = True) -> NBitsWeight:
    groups = -(-columns // 32)
    scales = RNG.uniform(0.02, 0.1, (rows, groups)).astype(np.float16)
    zeros = RNG.integers(5, 11, (rows, groups), np.uint8) if zero_points else None
    codes = RNG.integers(0, 16, (rows, columns), np.uint8)
    return NBitsWeight.from_codes(codes, scales, zeros, bits=4, group_size=32)


@pytest.mark.parametrize("zero_points", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_quantized_embedding_equals_eager(
    tmp_path: Path, family: str, *, zero_points: bool
) -> None:
    # Gemma scales what it gathers: that must stay.
    loaded = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path)
    (embedding,) = find_embeddings(loaded.model)
    assert embedding.name == "model.embed_tokens"
    weight = quantized(*embedding.weight().shape, zero_points=zero_points)
    embedding.quantize(weight)
    check(loaded.model, Stage.COMPRESSED, after="quantize")
    eager = load_eager(loaded.folder, {"model.embed_tokens": weight.dequantize()})
    lowered = lower(loaded.model)
    check(lowered, Stage.ONNXRUNTIME, after="lower")
    actual = GraphSession(lowered, tmp_path).logits(IDS)
    assert_close(actual, reference_logits(eager, IDS), loaded.config)


def test_tied_head_shares_what_is_stored(tmp_path: Path) -> None:
    loaded = load(str(tiny_model("smollm", tmp_path / "model")), work=tmp_path)
    (embedding,) = find_embeddings(loaded.model)
    head = find_linears(loaded.model)[-1]
    weight = quantized(*embedding.weight().shape)
    head.quantize(weight)
    embedding.quantize(weight, tied=head)
    check(loaded.model, Stage.COMPRESSED, after="quantize")
    assert embedding.node.inputs[1:4] == head.node.inputs[1:4]
    assert "model.embed_tokens.weight" not in loaded.model.graph.initializers
    names = {"model.embed_tokens": weight.dequantize(), "lm_head": weight.dequantize()}
    eager = load_eager(loaded.folder, names)
    actual = GraphSession(lower(loaded.model), tmp_path).logits(IDS)
    assert_close(actual, reference_logits(eager, IDS), loaded.config)


def test_head_keeps_its_weight_when_only_the_embedding_is_quantized(tmp_path: Path) -> None:
    loaded = load(str(tiny_model("smollm", tmp_path / "model")), work=tmp_path)
    (embedding,) = find_embeddings(loaded.model)
    original = embedding.weight().copy()
    embedding.quantize(quantized(*original.shape))
    np.testing.assert_array_equal(find_linears(loaded.model)[-1].weight(), original)


def test_quantized_embedding_is_not_found_again(tmp_path: Path) -> None:
    model = load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path).model
    (embedding,) = find_embeddings(model)
    embedding.quantize(quantized(*embedding.weight().shape))
    assert find_embeddings(model) == []
    assert embedding.node.op_type == GATHER_OP


def test_table_of_another_shape(tmp_path: Path) -> None:
    model = load(str(tiny_model("llama", tmp_path / "model")), work=tmp_path).model
    (embedding,) = find_embeddings(model)
    with pytest.raises(PassError, match=r"a \[7, 48\] table cannot replace \[131, 48\]"):
        embedding.quantize(quantized(7, 48))


def test_head_with_another_weight(tmp_path: Path) -> None:
    model: Any = load(str(tiny_model("smollm", tmp_path / "model")), work=tmp_path).model
    (embedding,) = find_embeddings(model)
    head = find_linears(model)[-1]
    head.quantize(quantized(*embedding.weight().shape))
    with pytest.raises(PassError, match="lm_head is not quantized with the same weight"):
        embedding.quantize(quantized(*embedding.weight().shape), tied=head)
