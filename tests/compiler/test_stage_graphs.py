"""``--keep-graphs``: one .onnx a stage, as a whole build writes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from eoracc.compiler import driver
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.stage_graphs import StageGraphs
from eoracc.errors import ConfigError
from tests.tiny_build import EORA, tiny_config, tiny_workspace

STAGES = [
    "00-frontend.onnx",
    "01-pack_projections.onnx",
    "02-calibrate+quantize_gptq+eora.onnx",
    "03-onnxruntime.onnx",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, driver.BuildResult]:
    workspace = tiny_workspace(tmp_path_factory.mktemp("stages"))
    verify = {"windows": 1, "window_length": 16, "parity": False}
    config = tiny_config(["pack_projections", *EORA], verify=verify)
    graphs = workspace / "graphs"
    progress = SilentProgress()
    result = driver.build(config, config_dir=workspace, progress=progress, keep_graphs=graphs)
    return workspace, result


def ops(path: Path) -> dict[str, int]:
    """How many nodes there are of each operator that is not standard, or is a matmul."""
    found: dict[str, int] = {}
    for node in onnx.load(path, load_external_data=False).graph.node:
        if node.domain or node.op_type == "MatMul":
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def test_there_is_a_graph_of_every_stage(built: tuple[Path, driver.BuildResult]) -> None:
    folder = built[0] / "graphs"
    assert sorted(path.name for path in folder.glob("*.onnx")) == STAGES
    before, packed, compressed, lowered = (ops(folder / name) for name in STAGES)
    # Two blocks of seven linears, and the head; q, k, v and gate, up are packed.
    assert before == {"MatMul": 15}
    assert packed == {"MatMul": 9}
    assert compressed == {"GatherNBits": 1, "MatMulNBitsLowRank": 9}
    assert lowered["MatMulNBitsLowRank"] <= 9
    assert lowered["GroupQueryAttention"] == 2


def test_the_first_graph_has_the_checkpoint_and_runs(
    built: tuple[Path, driver.BuildResult],
) -> None:
    folder = built[0] / "graphs"
    checkpoint = load_file(built[0] / "model" / "model.safetensors")
    model = onnx.load(folder / STAGES[0])
    stored = {entry.name: numpy_helper.to_array(entry) for entry in model.graph.initializer}
    name = "model.layers.0.mlp.down_proj.weight"
    weight = next(array for key, array in stored.items() if name in key)
    expected = checkpoint[name].astype(np.float32)
    assert np.array_equal(weight, expected) or np.array_equal(weight, expected.T)
    session = ort.InferenceSession(folder / STAGES[0], providers=["CPUExecutionProvider"])
    assert "logits" in {output.name for output in session.get_outputs()}


def test_the_report_times_every_pass(built: tuple[Path, driver.BuildResult]) -> None:
    passes = built[1].report.build.passes
    names = ["pack_projections", "calibrate", "quantize_gptq", "eora"]
    assert [entry["name"] for entry in passes] == names
    assert all(float(entry["wall_s"]) > 0 for entry in passes)
    (compress,) = (entry for entry in built[1].report.build.phases if entry["name"] == "compress")
    in_sweep = sum(float(entry["wall_s"]) for entry in passes[1:])
    assert in_sweep < float(compress["wall_s"])


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"is not empty \(notes\.txt\): give an empty folder"):
        StageGraphs(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match=r"--keep-graphs: .*file cannot be written"):
        StageGraphs(tmp_path / "file")


def test_two_passes_of_one_name_are_timed_apart() -> None:
    from eoracc.compiler.progress import PassTimes
    from eoracc.passes.calibrate import Calibrate

    first, second = Calibrate(), Calibrate()
    times = PassTimes()
    for layer_pass in (first, second, first):
        with times.measure(layer_pass):
            pass
    assert [time.name for time in times.times()] == ["calibrate", "calibrate"]
