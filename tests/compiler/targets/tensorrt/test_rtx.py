"""Whole builds of a tiny model for TensorRT-RTX; engines are built, and none is run."""

from __future__ import annotations

import hashlib
import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

from eoracc.compiler import driver
from eoracc.compiler.cli import main
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.content import Report
from eoracc.compiler.report.lines import report_lines
from eoracc.errors import ConfigError, PassError, TargetError
from eoracc.runtime.adapters.files import read_adapter
from eoracc.runtime.artifact.manifest import verify_manifest
from eoracc.runtime.tensorrt.engine_set import read_engine_set
from tests.optional import require
from tests.tiny_build import tiny_config, tiny_workspace
from tests.tiny_models import tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.compiler.config.sections import BuildConfig
    from eoracc.compiler.driver import BuildResult

require("tensorrt_rtx")

PASSES: list[Any] = [
    "calibrate",
    {"quantize_gptq": {"bits": 4, "group_size": 16, "symmetric": True}},
    {"eora": {"rank": 4}},
]
ENGINES: dict[str, Any] = {
    "compute_capabilities": ["8.6"],
    "context_length": 64,
    "sequence": [1, 4, 16],
    "logits": [1, 1, 8],
    "batch": [1, 1, 2],
}


def config(workspace: Path, **fields: Any) -> BuildConfig:  # noqa: ANN401 - sections
    defaults: dict[str, Any] = {
        "targets": ["tensorrt_rtx"],
        "tensorrt_rtx": ENGINES,
        "verify": {"windows": 1, "window_length": 16},
        "output": str(workspace / "out"),
    }
    return tiny_config(PASSES, **(defaults | fields))


def build(workspace: Path, options: BuildConfig) -> BuildResult:
    return driver.build(options, config_dir=workspace, progress=SilentProgress())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_workspace(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="module")
def built(workspace: Path) -> BuildResult:
    """With engines alone, adapters and all."""
    adapter = {
        "text": "text.txt",
        "samples": 4,
        "sequence_length": 32,
        "rank": 2,
        "factor_type": "float16",
        "verify": {"windows": 1, "window_length": 16},
    }
    engines = ENGINES | {"adapter_type": "float16", "rank": [0, 2, 4]}
    return build(workspace, config(workspace, tensorrt_rtx=engines, adapters={"prose": adapter}))


def test_a_context_beyond_the_models_positions_is_refused_before_any_work(workspace: Path) -> None:
    output = str(workspace / "long")
    options = config(workspace, output=output, tensorrt_rtx=ENGINES | {"context_length": 129})
    with pytest.raises(ConfigError, match=r"context_length: is 129, and the model has 128 pos"):
        build(workspace, options)


def test_attention_that_tensorrt_lacks_is_refused_before_any_work(workspace: Path) -> None:
    tiny_model("gemma2", workspace / "capped")
    options = config(workspace, model=str(workspace / "capped"), output=str(workspace / "none"))
    with pytest.raises(PassError, match="caps its scores"):
        build(workspace, options)


def test_engines_alone(built: BuildResult) -> None:
    manifest = verify_manifest(built.output)
    assert manifest.digest == built.manifest.digest
    names = {"model.onnx", "model.onnx.data", "parity.safetensors", "engines.json", "builder.log"}
    folder = {name for name in manifest.files if name.startswith("tensorrt_rtx/")}
    assert folder == {f"tensorrt_rtx/{name}" for name in (*names, "sm86.engine")}
    assert "model.onnx" not in manifest.files
    engines = read_engine_set(built.output / "tensorrt_rtx")
    (engine,) = engines.engines
    content = (built.output / "tensorrt_rtx" / engine.file).read_bytes()
    assert engine.sha256 == hashlib.sha256(content).hexdigest()
    assert engine.size == len(content)
    assert (engines.cache_layout, engines.cache_layers) == ("concat", 2)
    assert (engines.adapter_type, engines.max_rank) == ("float16", 4)
    stored = json.loads((built.output / "report.json").read_text())["targets"]["tensorrt_rtx"]
    summary = stored["engines"]["8.6"]
    assert summary["size"] == engine.size
    assert summary["weight_bytes"] >= stored["graph_weight_bytes"] * 0.99
    assert stored["profiles"]["decode"]["sequence"] == [1, 1, 1]
    lines = report_lines(Report.from_dict(json.loads((built.output / "report.json").read_text())))
    assert any(
        line.startswith("tensorrt_rtx: engines by compute capability: 8.6 ") for line in lines
    )


def test_the_gate_has_checked_the_graph(built: BuildResult) -> None:
    parity = built.report.parity
    assert parity["passed"]
    assert {case["through"] for case in parity["logits"]} == {"tensorrt_rtx"}
    assert max(case["tolerance"] for case in parity["logits"]) < parity["compression_effect"] / 10


def test_verify_repeats_the_check(built: BuildResult, tmp_path: Path) -> None:
    checked = CliRunner().invoke(main, ["verify", str(built.output), "--json"])
    assert checked.exit_code == 0, checked.output
    assert json.loads(checked.output)["parity"]["passed"]
    copy = shutil.copytree(built.output, tmp_path / "copy")
    engine = copy / "tensorrt_rtx" / "sm86.engine"
    content = engine.read_bytes()
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert CliRunner().invoke(main, ["verify", str(copy)]).exit_code == 2


def test_adapters_are_kept_for_engines_alone(built: BuildResult) -> None:
    adapter = read_adapter(built.output, "prose")
    assert adapter.factors
    bindings = {one.name: one for one in read_engine_set(built.output / "tensorrt_rtx").bindings}
    for linear, factors in adapter.factors.items():
        assert bindings[f"{linear}.lora_a"].shape == ("rank", factors.lora_a.shape[1])
        assert bindings[f"{linear}.lora_b"].shape == (factors.lora_b.shape[0], "rank")


def test_both_targets_side_by_side(workspace: Path, tmp_path: Path) -> None:
    engines = ENGINES | {"cache": "in_place"}
    fields = {
        "targets": ["onnxruntime", "tensorrt_rtx"],
        "tensorrt_rtx": engines,
        "output": str(tmp_path / "out"),
    }
    result = build(workspace, config(workspace, **fields))
    assert {"model.onnx", "tensorrt_rtx/model.onnx"} <= set(result.manifest.files)
    through = {case["through"] for case in result.report.parity["logits"]}
    assert through == {"library", "function", "tensorrt_rtx"}
    assert read_engine_set(result.output / "tensorrt_rtx").cache_layout == "in_place"
    genai = json.loads((result.output / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["filename"] == "model.onnx"
    again = build(workspace, config(workspace, **{**fields, "output": str(tmp_path / "again")}))
    assert again.manifest.digest == result.manifest.digest


def test_a_missing_package_is_said_before_anything_is_loaded(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "eoracc.compiler.targets.tensorrt.engines.build.util.find_spec", lambda _: None
    )
    options = config(workspace, model="absent", output=str(tmp_path / "out"))
    with pytest.raises(TargetError, match=r"pip install 'eoracc\[tensorrt-rtx\]'"):
        build(workspace, options)
    assert not list(tmp_path.iterdir())
