"""The real model, some of its weights as products of two, all rounded; run in three ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.report.content import Report
from eoracc.runtime import load
from tests.end_to_end.ways_of_running import build_in, genai_tokens, stock_tokens, until

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
TEXT = str(ROOT / "examples/smollm2/data/speeches-2000-2024.txt")
NEW_TOKENS = 32


@pytest.fixture(scope="module")
def artifact(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last two blocks factorised, then all blocks rounded to 4 bits and partly compensated."""
    work = tmp_path_factory.mktemp("factorized")
    all_but = {"*": {"skip": True}, "model.layers.28.*": {}, "model.layers.29.*": {}}
    compensated = {"*": {"skip": True}, "model.layers.29.*": {}}
    settings = {
        "model": str(smollm2_folder),
        "calibration": {"text": TEXT, "samples": 2, "sequence_length": 128},
        "passes": [
            "calibrate",
            {"svd_llm": {"ratio": 0.2, "overrides": all_but}},
            "calibrate",
            {"quantize_rtn": {"bits": 4, "group_size": 64}},
            {"eora": {"rank": 8, "factor_type": "int8", "overrides": compensated}},
        ],
        "onnxruntime": {"accuracy_level": 0},
        "verify": {"windows": 1, "window_length": 128},
    }
    return build_in(work, settings)


def test_the_report_shows_every_stage(artifact: Path) -> None:
    report = Report.from_dict(json.loads((artifact / "report.json").read_text()))
    assert report.parity["passed"]
    assert [one["linears"] for one in report.parity["linears"]] == [225, 225]
    rows = report.fidelity.rows
    assert [row.name for row in rows] == ["original", "svd_llm", "quantized", "eora"]
    assert rows[1].kl > 0
    # Two of thirty blocks do without a fifth of their weights; then all have four bits each.
    assert rows[1].bits_per_weight == pytest.approx(32 * (1 - 0.2 * 2 / 30), rel=1e-3)
    assert 4 < rows[2].bits_per_weight < rows[3].bits_per_weight < 5
    assert [one.rank for one in report.factorized[:4]] == [230, 115, 115, 230]
    for one in report.linears:
        if one.factor_of is not None and one.block == 29:
            assert one.errors["eora"] < one.errors["quantize_rtn"]


def test_three_ways_of_running_agree_token_by_token(artifact: Path) -> None:
    model = load(artifact)
    tokens = model.encode("Once upon a time there was a king who")
    ours = list(model.generate(tokens, NEW_TOKENS).tokens)
    ends = model.tokenizer.ends
    assert ours == until(genai_tokens(artifact, tokens, NEW_TOKENS), ends)
    assert ours == until(stock_tokens(artifact, tokens, NEW_TOKENS), ends)
    assert len(ours) > 8, "choose a prompt whose continuation is long enough"
