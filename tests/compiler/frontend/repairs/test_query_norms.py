from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from eoracc.compiler.frontend.load import load
from eoracc.errors import ModelError
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

KEY_NORM = "model.layers.1.self_attn.k_norm.weight"


def test_each_head_has_its_own_weight(tmp_path: Path) -> None:
    folder = tiny_model("cohere_norms", tmp_path / "model")
    graph = load(str(folder), work=tmp_path).model.graph
    stored = load_file(folder / "model.safetensors")[KEY_NORM]
    held = graph.initializers[KEY_NORM].const_value
    assert held is not None
    np.testing.assert_array_equal(held.numpy(), stored)
    # One before the attention and the layer's two for queries and keys, and the last one.
    assert Counter(node.op_type for node in graph)["LayerNormalization"] == 2 * 3 + 1


def test_norm_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    folder = tiny_model("cohere_norms", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[KEY_NORM]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"has no tensor {KEY_NORM} of 2 heads"):
        load(str(folder), work=tmp_path)


def test_norm_of_other_heads(tmp_path: Path) -> None:
    folder = tiny_model("cohere_norms", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors[KEY_NORM] = tensors[KEY_NORM][:1]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=f"has no tensor {KEY_NORM} of 2 heads"):
        load(str(folder), work=tmp_path)
