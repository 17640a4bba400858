from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import load
from eoracc.compiler.frontend_check import blocks as module
from eoracc.compiler.frontend_check.blocks import compared_blocks, first_blocks, shorten
from eoracc.compiler.frontend_check.check import check_frontend
from eoracc.compiler.progress import SilentProgress
from eoracc.errors import ModelError
from tests.graph_session import GraphSession, assert_close
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PretrainedConfig

_LAYERS = ["sliding_attention"] * 3 + ["full_attention", "sliding_attention"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of five blocks, the fourth of which has no window."""
    root = tmp_path_factory.mktemp("five")
    fields: dict[str, Any] = {"num_hidden_layers": 5, "layer_types": _LAYERS}
    return tiny_model("qwen2", root / "model", **fields, use_sliding_window=True, sliding_window=5)


def _config(blocks: int, **fields: object) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model("llama", num_hidden_layers=blocks, **fields)


@pytest.mark.parametrize(
    ("parameters", "blocks", "compared"),
    [
        (106_000_000, 30, 30),  # SmolLM2-135M
        (1 << 29, 28, 28),
        (1_310_000_000, 28, 11),  # Qwen2.5-1.5B
        (6_980_000_000, 32, 2),  # Llama 3 8B
        (68_000_000_000, 80, 2),
        (68_000_000_000, 1, 1),
    ],
)
def test_as_many_blocks_as_the_bound_allows(parameters: int, blocks: int, compared: int) -> None:
    assert compared_blocks(_config(blocks), parameters) == compared


def test_every_kind_of_block_is_compared(folder: Path, tmp_path: Path) -> None:
    config = load(str(folder), work=tmp_path).config
    assert compared_blocks(config, 1 << 40) == 4
    shorten(config, 4)
    assert (config.num_hidden_layers, config.layer_types) == (4, _LAYERS[:4])


def test_first_blocks_equal_an_eager_model_of_as_many(folder: Path, tmp_path: Path) -> None:
    loaded = load(str(folder), work=tmp_path)
    nodes = len(loaded.model.graph)
    model = first_blocks(loaded.model, 4)
    assert model is not None
    assert len(loaded.model.graph) == nodes
    names = {str(value.name) for value in (*model.graph.inputs, *model.graph.outputs)}
    assert "present.3.key" in names
    assert "present.4.key" not in names
    shorten(loaded.config, 4)
    eager = load_eager(folder, {}, config=loaded.config)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (2, 9))
    actual = GraphSession(model, tmp_path).logits(tokens, chunks=(8, 1))
    assert_close(actual, reference_logits(eager, tokens, chunks=(8, 1)), loaded.config)


def test_a_block_that_reads_more_than_one_value(folder: Path, tmp_path: Path) -> None:
    model = load(str(folder), work=tmp_path).model
    ends = [node for node in model.graph if str(node.name).startswith("model/layers.1/Add")]
    reader = next(node for node in model.graph if str(node.name).startswith("model/layers.2/Add"))
    reader.replace_input_with(1, ends[0].outputs[0])  # what attention left of block 1
    assert first_blocks(model, 2) is None


def test_the_rest_of_a_large_model_is_not_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PARAMETERS", 1)
    loaded = load(str(folder), work=tmp_path)
    attentions = [node for node in loaded.model.graph if node.op_type == "Attention"]
    attentions[4].attributes.add(ir.AttrFloat32("scale", 0.2))
    check_frontend(loaded, SilentProgress())
    attentions[3].attributes.add(ir.AttrFloat32("scale", 0.2))
    with pytest.raises(ModelError, match="attention of block 3"):
        check_frontend(loaded, SilentProgress())
