from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.onnxruntime.single_linears import open_linears
from tests.tiny_artifact import tiny_linears

if TYPE_CHECKING:
    from pathlib import Path

UNIT_ROUNDOFF = 2.0**-24


@pytest.mark.parametrize("library", [True, False])
def test_single_linears_compute_what_their_weights_say(tiny_artifact: Path, library: bool) -> None:
    linears = tiny_linears(tiny_artifact.parent)
    assert len(linears) == 15
    rng = np.random.default_rng(0)
    inputs = {width: rng.standard_normal((3, width), np.float32) for width in (48, 96, 88)}
    names = [linear.name for linear in linears]
    runs = open_linears(tiny_artifact, names, library=library, threads=1)
    for linear, run in zip(linears, runs, strict=True):
        x = inputs[linear.in_features].astype(np.float64)
        weight = linear.effective_weight().astype(np.float64)
        expected = x @ weight.T
        bound = 4 * (linear.in_features + 2) * UNIT_ROUNDOFF * (np.abs(x) @ np.abs(weight).T).max()
        assert bound < 1e-3 * expected.std()
        np.testing.assert_allclose(run(inputs), expected, rtol=0, atol=bound)


def test_unknown_linear_is_named(tiny_artifact: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no linear 'model\.layers\.9\.q_proj'"):
        next(open_linears(tiny_artifact, ["model.layers.9.q_proj"]))


def test_model_that_cannot_be_read(tiny_artifact: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_artifact, tmp_path / "artifact")
    (folder / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"model\.onnx: is no ONNX graph"):
        next(open_linears(folder, ["x"]))
