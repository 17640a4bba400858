"""What ``precision: auto`` took: on record, and only what the processor decided."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler import driver
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.progress import SilentProgress
from eoracc.compiler.report.inspection import ArtifactSummary, inspect_path
from eoracc.compiler.report.lines import report_lines
from eoracc.compiler.sweep import products
from tests.tiny_build import tiny_config, tiny_workspace

if TYPE_CHECKING:
    from pathlib import Path

QUANTIZE = {"quantize_rtn": {"bits": 4, "group_size": 16}}


@pytest.mark.parametrize(
    ("passes", "fast", "recorded"),
    [
        (["calibrate", QUANTIZE], True, ["bfloat16"]),
        (["calibrate", QUANTIZE], False, ["float32"]),
        ([{"calibrate": {"precision": "float32"}}, QUANTIZE], True, ["float32"]),
        (
            ["calibrate_outputs", {"calibrate": {"precision": "float32"}}, QUANTIZE],
            True,
            ["bfloat16", "float32"],
        ),
        ([QUANTIZE], True, []),
    ],
)
def test_a_build_records_the_precision_that_it_took(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: list[object],
    fast: bool,
    recorded: list[str],
) -> None:
    monkeypatch.setattr(products, "bfloat16_is_fast", lambda: fast)
    folder = tiny_workspace(tmp_path)
    config = tiny_config(passes, verify={"windows": 1, "window_length": 32, "parity": False})
    built = driver.build(config, config_dir=folder, progress=SilentProgress())
    assert list(built.report.build.precisions) == recorded

    manifest = json.loads((built.output / "manifest.json").read_text())
    written = BuildConfig.model_validate(manifest["config"])
    taken = [item.precision for item in written.passes if hasattr(item, "precision")]
    assert taken == recorded
    # What was asked for differs from what is on record in nothing else.
    for one, other in zip(manifest["config"]["passes"], config.resolved()["passes"], strict=True):
        (name,) = one
        different = {key for key in one[name] if one[name][key] != other[name][key]}
        assert different <= {"precision"}

    summary = inspect_path(built.output)
    assert isinstance(summary, ArtifactSummary)
    lines = [line for line in report_lines(summary.report) if line.startswith("calibration: ")]
    expected = f"calibration: products in {' and '.join(recorded)}"
    assert lines == ([expected] if recorded else [])
