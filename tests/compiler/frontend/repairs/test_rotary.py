from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.frontend.load import load
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    import onnx_ir as ir


def rotations(family: str, folder: Path) -> list[ir.Node]:
    model = load(str(tiny_model(family, folder / "model")), work=folder).model
    return [node for node in model.graph if node.op_type == "RotaryEmbedding"]


@pytest.mark.parametrize(
    ("family", "interleaved"), [("llama", 0), ("cohere", 1), ("ernie4_5", 1), ("helium", 1)]
)
def test_pairs_are_those_of_the_family(family: str, interleaved: int, tmp_path: Path) -> None:
    nodes = rotations(family, tmp_path)
    assert [node.attributes.get_int("interleaved", 0) for node in nodes] == [interleaved] * 4


def test_cohere2_rotates_in_layers_with_a_window_only(tmp_path: Path) -> None:
    nodes = rotations("cohere2", tmp_path)
    assert len(nodes) == 2
    assert all("layers.0." in str(node.inputs[0].name) for node in nodes if node.inputs[0])
