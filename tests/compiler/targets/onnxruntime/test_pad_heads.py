from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.targets.onnxruntime.pad_heads import HEAD_MULTIPLE, pad_heads
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


def cache_sizes(model: ir.Model) -> set[object]:
    return {
        value.shape[3]
        for value in (*model.graph.inputs, *model.graph.outputs)
        if str(value.name).startswith(("past_key_values", "present")) and value.shape
    }


# Gemma has a scale of its own, Llama's is derived from the size by default.
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("has_scale", [True, False])
def test_padding_changes_no_logit(family: str, tmp_path: Path, *, has_scale: bool) -> None:
    loaded = load(str(tiny_model(family, tmp_path / "model", head_dim=10)), work=tmp_path)
    if not has_scale:
        for node in attentions(loaded.model):
            node.attributes.pop("scale", None)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (2, 9))
    chunks = (6, 1, 2)
    expected = GraphSession(loaded.model, tmp_path).logits(ids, chunks=chunks)
    pad_heads(loaded.model.graph, attentions(loaded.model))
    assert cache_sizes(loaded.model) == {16}
    actual = GraphSession(loaded.model, tmp_path).logits(ids, chunks=chunks)
    assert_close(actual, expected, loaded.config)


def test_heads_that_fit_stay_as_they_are(tmp_path: Path) -> None:
    model = load(str(tiny_model("llama", tmp_path / "model", head_dim=24)), work=tmp_path).model
    before = len(list(model.graph))
    pad_heads(model.graph, attentions(model))
    assert cache_sizes(model) == {24}
    assert 24 % HEAD_MULTIPLE == 0
    assert len(list(model.graph)) == before
