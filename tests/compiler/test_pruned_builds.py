"""Builds with pruning passes: what the artifact holds, serves and reports."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper

from eoracc.compiler import driver
from eoracc.compiler.adapters.restore import restore_backbone
from eoracc.compiler.cli import main as cli
from eoracc.compiler.compare.run import compare
from eoracc.compiler.config.contradictions import contradictions
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.inspection import ArtifactSummary, inspect_path
from eoracc.compiler.targets.tensorrt.lower_rtx import lower as lower_rtx
from eoracc.errors import PassError
from eoracc.passes.graph.linears import block_of
from eoracc.runtime.artifact.manifest import verify_manifest
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from eoracc.compiler.driver import BuildResult
    from eoracc.passes.graph.linears import Linear

EORA: dict[str, Any] = {"eora": {"rank": 8, "factor_type": "float16"}}
GPTQ: dict[str, Any] = {"quantize_gptq": {"bits": 4, "embedding_bits": None}}
QUICK: dict[str, Any] = {"windows": 1, "window_length": 16, "parity": False}
RTN: dict[str, Any] = {"quantize_rtn": {"bits": 4, "embedding_bits": None}}


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_workspace(tmp_path_factory.mktemp("pruned"))


@pytest.fixture
def workspace(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "workspace"))


def build(workspace: Path, passes: list[Any], **fields: Any) -> BuildResult:  # noqa: ANN401
    config = tiny_config(passes, **fields)
    return driver.build(config, config_dir=workspace, progress=SilentProgress())


def stored_linears(workspace: Path) -> list[Linear]:
    """The linears of decoder blocks, restored from the artifact's own weights."""
    model = frontend.load(str(workspace / "model"), work=workspace / "again").model
    backbone = restore_backbone(workspace / "out", model)
    return [linear for linear in backbone.linears if linear.block is not None]


def check_runs(weight: NDArray[np.float32], kept: int, run: int) -> None:
    groups = weight.reshape(len(weight), -1, run)
    assert (np.count_nonzero(groups, axis=2) <= kept).all()


@pytest.mark.parametrize("method", ["prune_magnitude", "prune_wanda", "prune_sparsegpt"])
@pytest.mark.parametrize("quantization", [None, GPTQ, RTN])
def test_every_group_of_four_in_the_artifact(
    workspace: Path, method: str, quantization: dict[str, Any] | None
) -> None:
    passes: list[Any] = ["calibrate", {method: {"pattern": "2:4"}}]
    passes += [] if quantization is None else [quantization]
    result = build(workspace, [*passes, EORA])
    verify_manifest(workspace / "out")
    rows = {row.name: row for row in result.report.fidelity.rows}
    assert list(rows) == ["original", "compressed", "svd", "eora"]
    # The logits of random weights say little of a method; the head's input is what it minimises.
    assert rows["eora"].kl < rows["compressed"].kl
    linears = stored_linears(workspace)
    assert len(linears) == 14
    for linear in linears:
        check_runs(linear.backbone_weight(), 2, 4)
        assert linear.factors is not None
        assert linear.factors.rank == 8
        assert (linear.quantized is None) == (quantization is None)
    reported = [one for one in result.report.linears if one.block is not None]
    assert {one.sparsity for one in reported} == {0.5}
    for one in reported:
        *earlier, last = one.errors.items()
        assert last[0] == "eora"
        assert last[1] < min(error for _, error in earlier)


def test_floats_of_the_artifact_itself(workspace: Path) -> None:
    build(workspace, [{"prune_magnitude": {"pattern": "4:8"}}])
    model = onnx.load(workspace / "out" / "model.onnx")
    weights = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in model.graph.initializer
        if tensor.name.endswith(".dense_weight")
    }
    assert len(weights) == 14
    for stored in weights.values():
        check_runs(stored.T, 4, 8)
    assert {node.op_type for node in model.graph.node if node.domain == "eoracc"} == set()
    summary = inspect_path(workspace / "out")
    assert isinstance(summary, ArtifactSummary)
    shown = {linear["name"]: linear for linear in summary.as_dict()["linears"]}
    assert shown["model.layers.0.mlp.up_proj"]["sparsity"] == 0.5
    assert summary.bits_per_weight == 32
    table = CliRunner().invoke(cli, ["inspect", str(workspace / "out")], env={"COLUMNS": "200"})
    assert "zeros" in table.stdout
    assert table.stdout.count("50.0%") == 14


def test_different_shares_and_a_linear_in_floats_beside_codes(workspace: Path) -> None:
    passes: list[Any] = [
        "calibrate",
        {"prune_sparsegpt": {"sparsity": 0.4, "overrides": {"*.down_proj": {"pattern": "2:4"}}}},
        {"quantize_gptq": {"bits": 4, "overrides": {"*.o_proj": {"skip": True}}}},
        {"eora": {"rank": 4}},
    ]
    build(workspace, passes)
    for linear in stored_linears(workspace):
        weight = linear.backbone_weight()
        if linear.role == "down_proj":
            check_runs(weight, 2, 4)
        assert np.count_nonzero(weight == 0) >= int(0.4 * weight.size)
        assert (linear.quantized is None) == (linear.role == "o_proj")


def test_an_interrupted_build_ends_the_same(
    template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eoracc.compiler.kept.interval import SaveInterval
    from eoracc.passes.compensate.eora import Eora

    monkeypatch.setattr(SaveInterval, "is_due", property(lambda _: True))
    passes: list[Any] = ["calibrate", {"prune_sparsegpt": {"pattern": "2:4"}}, EORA]
    whole, broken = (Path(shutil.copytree(template, tmp_path / name)) for name in ("a", "b"))
    digest = build(whole, passes).manifest.digest
    calls, call = 0, Eora.call

    def fail(self: Eora, group: Any) -> None:  # noqa: ANN401
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        call(self, group)

    with monkeypatch.context() as patched:
        patched.setattr(Eora, "call", fail)
        with pytest.raises(KeyboardInterrupt):
            build(broken, passes)
    resumed = build(broken, passes)
    assert resumed.manifest.digest == digest
    assert {one.sparsity for one in resumed.report.linears if one.block is not None} == {0.5}


def test_adapters_need_codes() -> None:
    adapters = {"task": {"text": "text.txt", "rank": 2, "factor_type": "int8"}}
    fields = {"adapters": adapters, "onnxruntime": {"adapter_type": "int8"}}
    found = dict(contradictions(tiny_config(["calibrate", "prune_wanda"], **fields)))
    assert found["adapters",].startswith("needs a quantize pass")
    assert not dict(contradictions(tiny_config(["calibrate", "prune_wanda", RTN], **fields)))


def test_engines_take_no_factors_beside_floats(workspace: Path) -> None:
    passes = ["calibrate", {"prune_wanda": {"pattern": "2:4"}}, EORA]
    config = tiny_config(passes, targets=["onnxruntime", "tensorrt_rtx"])
    found = dict(contradictions(config))
    assert "takes no low-rank factors beside weights of floats" in found["targets", 1]
    build(workspace, passes)
    model = frontend.load(str(workspace / "model"), work=workspace / "again").model
    restored = restore_backbone(workspace / "out", model)
    with pytest.raises(PassError, match=r"q_proj.*low-rank factors beside a weight of floats"):
        lower_rtx(restored.model)


@pytest.mark.parametrize("quantization", [None, GPTQ])
def test_methods_compare_on_the_same_pruned_backbone(
    workspace: Path, quantization: dict[str, Any] | None
) -> None:
    passes = ["calibrate", {"prune_sparsegpt": {"pattern": "2:4"}}, {"eora": {"rank": 1}}]
    if quantization is not None:
        passes.insert(2, quantization)
    config = tiny_config(passes, verify=QUICK)
    budget = "20" if quantization is None else "8"
    found = compare(
        config,
        ["none", "svd", "eora"],
        [budget],
        config_dir=workspace,
        progress=SilentProgress(),
    )
    rows = {row.method: row for row in found.rows}
    assert all(row.skipped is None for row in found.rows)
    assert rows["svd"].rank == rows["eora"].rank
    assert rows["eora"].figures is not None
    assert rows["none"].figures is not None
    assert rows["eora"].figures.bits_per_weight <= float(budget)
    assert rows["eora"].figures.kl < rows["none"].figures.kl


@pytest.mark.parametrize("survey", ["allocate", "select_last_k"])
def test_surveys_choose_bits_of_what_is_pruned(workspace: Path, survey: str) -> None:
    options: dict[str, Any] = {"bits_per_weight": 4.0, "distortion": "relative", "ranks": [0]}
    if survey == "select_last_k":
        options = {"average_bits": 3.0}
    passes = [
        {survey: options},
        "calibrate",
        {"prune_sparsegpt": {"pattern": "2:4"}},
        GPTQ,
        {"eora": {"rank": 4}},
    ]
    result = build(workspace, passes, verify=QUICK)
    bits = {one.bits for one in result.report.linears if one.block is not None}
    assert len(bits) > 1
    for linear in stored_linears(workspace):
        check_runs(linear.backbone_weight(), 2, 4)


def test_engines_multiply_with_the_zeros(workspace: Path) -> None:
    build(workspace, [{"prune_magnitude": {"pattern": "2:4"}}], verify=QUICK | {"compare": []})
    model = frontend.load(str(workspace / "model"), work=workspace / "again").model
    lowered = lower_rtx(restore_backbone(workspace / "out", model).model)
    found = 0
    for node in lowered.graph:
        if node.op_type == "MatMul" and block_of(str(node.name)) is not None:
            value = node.inputs[1]
            assert value is not None
            assert value.const_value is not None
            weight = value.const_value.numpy()
            assert weight.dtype == np.float16
            check_runs(weight.T, 2, 4)
            found += 1
    assert found == 14
