from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.frontend.load import load
from eoracc.passes.graph.spec import Stage, check
from tests.graph_session import assert_equals_eager
from tests.tiny_models import OTHER_FAMILIES, tiny_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_repaired_graph_equals_eager_model(family: str, tmp_path: Path) -> None:
    loaded = load(str(tiny_model(family, tmp_path / "model")), work=tmp_path)
    check(loaded.model, Stage.FRONTEND, after="frontend")
    assert_equals_eager(loaded, tmp_path)
