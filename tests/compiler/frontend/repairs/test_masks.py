from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import pytest

from eoracc.compiler.frontend.load import load
from eoracc.compiler.frontend.repairs.masks import restore_masks
from eoracc.passes.graph.names import WINDOW_KEY
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path


def attentions(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Attention"]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "olmo3"])
def test_all_masks_are_boolean_and_all_attentions_causal(family: str, tmp_path: Path) -> None:
    model = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path).model
    for node in attentions(model):
        mask = node.inputs[3]
        assert mask is not None
        assert mask.dtype == ir.DataType.BOOL
        assert node.attributes.get_int("is_causal") == 1


@pytest.mark.parametrize(
    ("family", "windows"),
    [("llama", ["0", "0"]), ("mistral", ["5", "5"]), ("gemma2", ["5", "0"]), ("olmo3", ["5", "0"])],
)
def test_each_attention_notes_the_window_of_its_layer(
    family: str, windows: list[str], tmp_path: Path
) -> None:
    loaded = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path)
    assert [node.metadata_props[WINDOW_KEY] for node in attentions(loaded.model)] == windows


def test_mask_that_differs_between_heads_is_left_alone(tmp_path: Path) -> None:
    loaded = load(str(tiny_model("mistral", tmp_path / "model")), work=tmp_path)
    node = attentions(loaded.model)[0]
    biases = ir.Value(
        name="biases", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", 6, "S", "T"])
    )
    del node.metadata_props[WINDOW_KEY]
    node.replace_input_with(3, biases)
    restore_masks(loaded.model, loaded.config)
    assert node.inputs[3] is biases
    assert WINDOW_KEY not in node.metadata_props
