"""The importance matrix that llama.cpp is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.gguf_files import importance, tensor_name
from eoracc.compiler.eager.model import load_eager
from eoracc.compiler.frontend.load import load
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.text.windows import Windows
from eoracc.passes.graph.linears import find_linears
from tests.tiny_models import VOCABULARY, tiny_model


def test_importance_is_the_mean_square_of_every_input(tmp_path: Path) -> None:
    loaded = load(str(tiny_model("smollm", tmp_path / "model")), work=tmp_path / "work")
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (3, 24))
    windows = Windows(ids, np.ones_like(ids))
    found = importance(loaded, windows, tmp_path, SilentProgress())
    linears = [one for one in find_linears(loaded.model) if one.block is not None]
    assert found.keys() == {tensor_name(one) for one in linears}
    model = load_eager(loaded.folder, {})
    seen: dict[str, NDArray[np.float64]] = {}
    for linear in linears:

        def hook(_: Any, given: Any, name: str = tensor_name(linear)) -> None:  # noqa: ANN401
            seen[name] = given[0].flatten(0, 1).double().square().mean(0).numpy()

        model.get_submodule(linear.name).register_forward_pre_hook(hook)
    with torch.inference_mode():
        model(input_ids=torch.from_numpy(ids))
    for name, squares in seen.items():
        # A few roundings to eight bits lie before each input, where the processor has units for it.
        limit = 8 * 2.0**-8 * squares.max()
        np.testing.assert_allclose(found[name], squares, rtol=0, atol=limit)
        assert np.ptp(squares) > 5 * limit
