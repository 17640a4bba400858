from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.compiler.frontend.load import load
from tests.graph_session import assert_equals_eager
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("gemma3", {"final_logit_softcapping": 2.0}),
        # Gemma 3 has the field of Gemma 2, and eager transformers does not read it.
        ("gemma3", {"attn_logit_softcapping": 0.4}),
        ("gemma2", {"final_logit_softcapping": 1e4, "attn_logit_softcapping": 0.4}),
        ("gemma2", {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1e4}),
    ],
)
def test_each_cap_acts_as_in_the_eager_model(
    family: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    loaded = load(str(tiny_model(family, tmp_path / "model", **fields)), work=tmp_path)
    assert_equals_eager(loaded, tmp_path)


@pytest.mark.parametrize(("family", "count"), [("gemma3", 0), ("gemma2", 1)])
def test_logits_are_capped_once_where_the_configuration_says_so(
    family: str, count: int, tmp_path: Path
) -> None:
    model = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path).model
    assert Counter(node.op_type for node in model.graph)["Tanh"] == count
    assert model.graph.outputs[0].name == "logits"


def test_queries_keys_and_values_are_clipped_before_the_rotation(tmp_path: Path) -> None:
    model = load(str(tiny_model("olmo", tmp_path / "model")), work=tmp_path).model
    clips = [node for node in model.graph if node.op_type == "Clip"]
    readers = [use.node.op_type for node in clips for use in node.outputs[0].uses()]
    assert sorted(readers) == ["Attention"] * 2 + ["RotaryEmbedding"] * 4
