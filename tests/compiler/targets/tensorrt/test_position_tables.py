from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from onnx_ir.passes import common

from eoracc.compiler.eager.model import load_eager, reference_logits
from eoracc.compiler.frontend.load import LoadedModel, load
from eoracc.compiler.targets.tensorrt.engine_graph import check_contexts
from eoracc.compiler.targets.tensorrt.position_tables import cut_position_tables
from eoracc.errors import ConfigError
from tests.graph_session import GraphSession, assert_close
from tests.tiny_build import tiny_config
from tests.tiny_models import VOCABULARY, tiny_model

if TYPE_CHECKING:
    from pathlib import Path

ORIGINAL = 32


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    work = tmp_path_factory.mktemp("long_rope")
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.05 * index for index in range(8)],
        "long_factor": [1.0 + 0.3 * index for index in range(8)],
        "original_max_position_embeddings": ORIGINAL,
    }
    return load(str(tiny_model("llama", work / "model", rope_parameters=parameters)), work=work)


def test_long_rope_keeps_the_rows_for_short_texts(long_rope: LoadedModel, tmp_path: Path) -> None:
    model = long_rope.model.clone()
    cut_position_tables(model.graph, 20)
    common.RemoveUnusedNodesPass()(model)
    assert "ReduceMax" not in {node.op_type for node in model.graph}
    tables = [value for name, value in model.graph.initializers.items() if "_table" in name]
    assert [tuple(table.shape or ()) for table in tables] == [(20, 8)] * 2
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, 20))
    expected = reference_logits(load_eager(long_rope.folder, {}), ids)
    assert_close(GraphSession(model, tmp_path).logits(ids), expected, long_rope.config)


def test_engines_take_no_text_beyond_the_original_length(long_rope: LoadedModel) -> None:
    config = tiny_config(targets=["tensorrt_rtx"], tensorrt_rtx={"context_length": 64})
    message = r"is 64, and the model has 32 positions before its LongRoPE changes: lower it to that"
    with pytest.raises(ConfigError, match=message):
        check_contexts(config, long_rope)
