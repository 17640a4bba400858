"""The real model for TensorRT: graphs against eager PyTorch, an engine in its 4 bits, a bundle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eoracc.compiler.report.content import Report
from eoracc.runtime.tensorrt.engine_set import read_engine_set
from tests.end_to_end.ways_of_running import build_in, eoracc

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 134_515_008
"""Of SmolLM2-135M, its tied table once."""


@pytest.fixture(scope="module")
def artifact(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rounded to 4 bits, table and head included, with factors, for both ways to TensorRT."""
    work = tmp_path_factory.mktemp("tensorrt")
    ranges = {"sequence": [1, 64, 256], "context_length": 512, "compute_capabilities": ["8.9"]}
    table = {"bits": 4, "group_size": 96}
    settings = {
        "model": str(smollm2_folder),
        "passes": [
            {
                "quantize_rtn": {
                    "bits": 4,
                    "group_size": 96,
                    "symmetric": True,
                    "overrides": {"lm_head": table, "model.embed_tokens": table},
                }
            },
            {
                "svd": {
                    "rank": 4,
                    "factor_type": "float16",
                    "overrides": {"lm_head": {"skip": True}},
                }
            },
        ],
        "targets": ["tensorrt_rtx", "tensorrt"],
        "tensorrt_rtx": ranges | {"cache": "in_place"},
        "tensorrt": ranges,
        "verify": {
            "text": str(ROOT / "examples/smollm2/data/speeches-2000-2024.txt"),
            "windows": 1,
            "window_length": 128,
        },
    }
    return build_in(work, settings)


def test_graphs_compute_what_the_compressed_model_does(artifact: Path) -> None:
    parity = Report.from_dict(json.loads((artifact / "report.json").read_text())).parity
    assert parity["passed"]
    assert {case["through"] for case in parity["logits"]} == {"tensorrt_rtx", "tensorrt"}
    for case in parity["logits"]:
        assert case["max_error"] <= case["tolerance"] < 0.01 * parity["compression_effect"]


def test_an_engine_keeps_weights_in_their_bits(artifact: Path) -> None:
    report: dict[str, Any] = json.loads((artifact / "report.json").read_text())
    built = report["targets"]["tensorrt_rtx"]
    engine = built["engines"]["8.9"]
    assert set(engine["constant_bytes"]) == {"Int4", "Half", "Float"}
    assert engine["weight_bytes"] == pytest.approx(built["graph_weight_bytes"], rel=1e-3)
    # Codes, a scale for each 96 of them, factors, norms.
    assert 4 < engine["weight_bytes"] * 8 / PARAMETERS < 4.4
    (file,) = read_engine_set(artifact / "tensorrt_rtx").engines
    assert file.size == engine["size"] == (artifact / "tensorrt_rtx" / file.file).stat().st_size
    # Kernels as text, and the description of layers, come to some 21 MB, however wide a model is.
    assert engine["weight_bytes"] < engine["size"] < engine["weight_bytes"] + 25_000_000


def test_verify_repeats_parity_without_a_gpu(artifact: Path) -> None:
    done = eoracc("verify", artifact, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parity"]["passed"]
    assert {one["backend"] for one in found["engines"]} <= {"tensorrt_rtx", "tensorrt"}
