from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.compiler.frontend.load import load
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path


# The root of 48 is rounded to 6.93 by two decimals and to 6.929688 by float16.
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3"])
def test_embeddings_are_scaled_by_the_root_in_float32(family: str, tmp_path: Path) -> None:
    graph = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path).model.graph
    gather = next(node for node in graph if "embed_tokens" in str(node.inputs[0].name))  # type: ignore[union-attr]
    (use,) = gather.outputs[0].uses()
    scale = use.node.inputs[1]
    assert scale is not None
    assert scale.const_value is not None
    assert scale.const_value.numpy().item() == np.float32(48**0.5)


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_scores_are_scaled_by_the_scalar_of_the_configuration(family: str, tmp_path: Path) -> None:
    graph = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path).model.graph
    scales = [node.attributes["scale"].as_float() for node in graph if node.op_type == "Attention"]
    assert scales == pytest.approx([24**-0.5] * 2)
