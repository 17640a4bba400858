"""Whole builds of models whose weights become products of two."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from eoracc.compiler import driver
from eoracc.compiler.adapters.add import solve_for_artifact
from eoracc.compiler.adapters.exchange import export_onnx, export_peft
from eoracc.compiler.adapters.restore import restore_backbone
from eoracc.compiler.cli import main
from eoracc.compiler.config.sections import AdapterConfig
from eoracc.compiler.frontend import load as frontend
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.sweep.executor import Executor
from eoracc.errors import ArtifactError
from eoracc.passes.solvers.factorization import factorized_rank
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.compiler.driver import BuildResult

HELD_OUT = {"windows": 2, "window_length": 32}
FACTORIZE = {"factorize_svd": {"ratio": 0.3}}
QUANTIZE = {"quantize_gptq": {"bits": 3, "group_size": 16}}
EORA = {"eora": {"rank": 4, "factor_type": "int8"}}
BOTH = ["calibrate", FACTORIZE, "calibrate", QUANTIZE, EORA]
MATH: dict[str, Any] = {
    "text": "text.txt",
    "samples": 4,
    "sequence_length": 32,
    "rank": 3,
    "verify": HELD_OUT,
}


def build(workspace: Path, passes: list[Any], **fields: Any) -> BuildResult:  # noqa: ANN401
    config = tiny_config(passes, **{"verify": HELD_OUT, **fields})
    return driver.build(config, config_dir=workspace, progress=SilentProgress())


@pytest.mark.parametrize(
    ("family", "passes", "level"),
    [
        ("gemma3", ["pack_projections", "calibrate", FACTORIZE], 0),
        ("qwen2", ["pack_projections", *BOTH], 0),
        ("phi3", BOTH, 4),
        ("llama_bias", BOTH, 0),
    ],
    ids=["gemma3 packed, plain factors", "qwen2 packed", "phi3 int8", "with biases"],
)
def test_artifacts_compute_what_the_factors_say(
    tmp_path: Path, family: str, passes: list[Any], level: int
) -> None:
    """The parity gate compares with PyTorch, which has modules of its own for the factors."""
    result = build(tiny_workspace(tmp_path, family), passes, onnxruntime={"accuracy_level": level})
    parity = result.report.parity
    assert parity["passed"]
    assert {case["through"] for case in parity["logits"]} == {"library", "function"}
    for case in parity["logits"]:
        assert case["tolerance"] < (0.5 if level else 1e-3) * parity["compression_effect"]


def test_the_report_counts_against_the_weights_of_the_original(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    skip = {"factorize_svd": {"ratio": 0.3, "overrides": {"*.down_proj": {"skip": True}}}}
    report = build(workspace, ["calibrate", skip, *BOTH[2:]]).report
    original, factorized, quantized, shipped = report.fidelity.rows
    names = ["original", "factorize_svd", "quantized", "eora"]
    assert [row.name for row in report.fidelity.rows] == names

    products = {one.name: one for one in report.factorized}
    assert len(products) == 2 * 6
    for name, one in products.items():
        rows, columns = one.shape
        assert one.rank == factorized_rank(rows, columns, 0.3)
        assert one.removed == pytest.approx(1 - one.rank * (rows + columns) / (rows * columns))
        assert list(one.errors) == ["factorize_svd"]
        assert 0 < one.errors["factorize_svd"] < 1
        parts = [linear for linear in report.linears if linear.factor_of == name]
        assert [linear.role for linear in parts] == [f"{one.role}.v", f"{one.role}.u"]
        assert [linear.shape for linear in parts] == [(one.rank, columns), (rows, one.rank)]

    *linears, head = report.linears
    weights = sum(math.prod(one.shape) for one in products.values())
    weights += sum(math.prod(one.shape) for one in linears if one.factor_of is None)
    kept = sum(math.prod(one.shape) for one in linears)
    assert factorized.bits_per_weight == pytest.approx(32 * kept / weights)
    assert original.bytes - factorized.bytes == 4 * (weights - kept)
    stored = sum(one.bytes for one in linears)
    assert shipped.bits_per_weight == pytest.approx(8 * stored / weights)
    table = 4 * math.prod(head.shape) - head.bytes
    assert original.bytes - shipped.bytes == 4 * weights - stored + table
    assert quantized.bytes < shipped.bytes < factorized.bytes

    shown = CliRunner().invoke(main, ["inspect", str(workspace / "out")])
    assert shown.exit_code == 0
    assert "weights as products u v" in shown.output
    assert f"{shipped.bits_per_weight:.2f} bits per weight" in shown.output


def test_plain_factors_end_with_the_row_of_their_pass(tmp_path: Path) -> None:
    limits = {"verify": {**HELD_OUT, "parity": False, "limits": {"perplexity_ratio": 1e6}}}
    report = build(tiny_workspace(tmp_path), ["calibrate", FACTORIZE], **limits).report
    assert [row.name for row in report.fidelity.rows] == ["original", "factorize_svd"]
    assert report.fidelity.rows[-1].bits_per_weight < 32 * 0.7


def test_adapters_of_quantized_factors_are_solved_with_the_build(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    adapters = {"math": MATH}
    result = build(workspace, BOTH, adapters=adapters)
    solved = result.report.adapters.solved["math"]
    assert solved.linears == 2 * 14
    assert solved.error_with < solved.error_without
    assert result.report.adapters.parity["math"].passed
    with pytest.raises(ArtifactError, match=r"'model\.layers\.0\.\S+' is a factor of the weight"):
        export_peft(workspace / "out", "math", tmp_path / "peft")
    assert export_onnx(workspace / "out", "math", tmp_path / "onnx")
    with pytest.raises(ArtifactError, match=r"has quantized factors of 'model\.layers\.0.*under"):
        solve_for_artifact(
            workspace / "out",
            "code",
            AdapterConfig.model_validate(MATH),
            data_dir=workspace,
            progress=SilentProgress(),
            model=str(workspace / "model"),
        )


def test_plain_factors_come_back_from_an_artifact(tmp_path: Path) -> None:
    workspace = tiny_workspace(tmp_path)
    some = {"factorize_svd": {"ratio": 0.3, "overrides": {"*mlp*": {"skip": True}}}}
    rest = {"quantize_gptq": {"bits": 3, "overrides": {"*self_attn*": {"skip": True}}}}
    quick = {**HELD_OUT, "parity": False}
    result = build(workspace, ["calibrate", some, "calibrate", rest], verify=quick)
    model = frontend.load(str(workspace / "model"), work=tmp_path / "work").model
    found = restore_backbone(workspace / "out", model)
    names = [linear.name for linear in found.linears]
    assert names == [linear.name for linear in result.report.linears]
    shapes = [(one.out_features, one.in_features) for one in found.linears]
    assert shapes == [one.shape for one in result.report.linears]
    restored = Executor(found.model, found.linears)
    assert restored.parameter_bytes == result.report.fidelity.rows[-1].bytes
    added = solve_for_artifact(
        workspace / "out",
        "math",
        AdapterConfig.model_validate(MATH),
        data_dir=workspace,
        progress=SilentProgress(),
        model=str(workspace / "model"),
    )
    assert added.report.parity["math"].passed
    assert {name.rpartition(".")[2] for name in added.adapter.factors} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_outputs_are_matched_through_factorised_weights(tmp_path: Path) -> None:
    """What the first sweep took is made good where a second one matches outputs."""
    match = {"calibrate": {"match": "outputs"}}
    quick = {**HELD_OUT, "parity": False}
    workspace = tiny_workspace(tmp_path)
    report = build(workspace, ["calibrate", FACTORIZE, match, QUANTIZE], verify=quick).report
    assert all(np.isfinite(row.perplexity) for row in report.fidelity.rows)
