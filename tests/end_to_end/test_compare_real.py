from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner

from eoracc.compiler.cli import main

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.real


def test_compensations_at_equal_bytes(smollm2_folder: Path, tmp_path: Path) -> None:
    from examples.smollm2.fetch import fetch

    files = fetch()
    model_yaml = tmp_path / "model.yaml"
    content = {
        "model": str(smollm2_folder),
        "calibration": {"text": str(files.calibration), "samples": 4, "sequence_length": 256},
        "passes": [
            {"calibrate": {"through": "original"}},
            {"quantize_gptq": {"bits": 3, "group_size": 64}},
            {"eora": {"factor_type": "int8"}},
        ],
        "verify": {"text": str(files.evaluation), "windows": 1, "window_length": 256},
        "compare": {"methods": ["none", "eora"], "budgets": [4.25]},
        "output": "out",
    }
    model_yaml.write_text(yaml.safe_dump(content))
    rows_file, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    arguments = ["compare", str(model_yaml), "--json", str(rows_file), "--plot", str(plot)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    comparison = json.loads(rows_file.read_text())
    none, eora = comparison["rows"]
    # 3 bits, and 20 bits of scale and zero point for 64 weights, all of which rows divide into.
    assert none["bits_per_weight"] == 3 + 20 / 64
    # A rank is 0.024 bits here, and 16 of them a tile of lora_a: rank 33 would take 4.3 bits.
    assert eora["rank"] == 32
    assert 4 < eora["bits_per_weight"] <= 4.25
    assert 0 < eora["kl"] < none["kl"]
    assert comparison["original"]["perplexity"] < eora["perplexity"] < none["perplexity"]
    assert comparison["through"] == "original"
    assert comparison["shared_s"] > 0
    assert ">eora</text>" in plot.read_text()
