"""The main job on the real model: built once through the command line, run in three ways."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from eoracc.compiler.report.content import Report
from eoracc.runtime import load
from tests.end_to_end.ways_of_running import (
    eoracc,
    genai_tokens,
    python,
    stock_gaps,
    until,
)

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "smollm2"
PROMPTS = (
    "Once upon a time there was a king who",
    "My fellow citizens, the state of our union",
)
NEW_TOKENS = 64

LOADED = """
import sys
from eoracc.runtime import load
print(load(sys.argv[1]).generate("The sky is", 4).text)
print([name for name in ("torch", "transformers", "onnx_ir", "eoracc.compiler", "eoracc.passes")
       if name in sys.modules])
"""


@pytest.fixture(scope="module")
def artifact(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example with little text, built in a process of its own."""
    assert smollm2_gguf.parent == EXAMPLE / "data"
    output = tmp_path_factory.mktemp("smollm2") / "artifact"
    settings = {
        "calibration.samples": 4,
        # Four windows are too few to match outputs by.
        "passes.calibrate.match": "weights",
        "verify.windows": 1,
        "verify.limits.perplexity_ratio": 2,
        "output": output,
    }
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    done = eoracc("build", EXAMPLE / "model.yaml", "--json", *sets)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["output"] == str(output)
    assert [path.name for path in output.parent.iterdir()] == ["artifact"]
    return output


@pytest.fixture(scope="module")
def report(artifact: Path) -> Report:
    return Report.from_dict(json.loads((artifact / "report.json").read_text()))


def test_parity_passed_far_below_the_signal(report: Report) -> None:
    assert report.parity["passed"]
    assert [one["linears"] for one in report.parity["linears"]] == [211, 211]
    assert len(report.parity["logits"]) == 6
    for case in report.parity["logits"]:
        # The library rounds activations to int8, the functions do not. Its bound is below the
        # effect of compression, or the artifact would have float activations.
        assert case["max_error"] < 0.25 * report.parity["compression_effect"]
        share = 1 if case["through"] == "library" else 1e-2
        assert case["tolerance"] < share * report.parity["compression_effect"]


def test_compensation_lowers_the_error_of_every_linear(report: Report) -> None:
    *compressed, head = report.linears
    assert len(compressed) == 210
    for linear in compressed:
        bits = {"q_proj": 6, "k_proj": 6, "v_proj": 6, "o_proj": 4}.get(linear.role, 3)
        assert (linear.bits, linear.group_size) == (bits, 64)
        if bits > 3:  # attention has bits instead of factors
            assert (linear.rank, "eora" in linear.errors) == (0, False)
            continue
        assert linear.rank == 32
        # EoRA is the best correction of that rank in this very norm: Eckart-Young.
        assert linear.errors["eora"] <= 0.95 * linear.errors["quantize_gptq"], linear.name
    assert (head.name, head.bits, head.rank) == ("lm_head", 6, 0)


def test_fidelity_is_better_with_compensation_than_without(report: Report) -> None:
    rows = {row.name: row for row in report.fidelity.rows}
    assert list(rows) == ["original", "quantized", "svd", "eora"]
    # So little text cannot rank two compensations, but it can tell one from none. Calibration in
    # bfloat16 or float32, by processor, moves each KL by several percent.
    for name in ("svd", "eora"):
        assert rows[name].kl < 0.97 * rows["quantized"].kl
        assert rows[name].perplexity < rows["quantized"].perplexity
    assert rows["eora"].bytes == rows["svd"].bytes
    # Scales of 16 bits, zero points of 4 or, next to codes of 6 bits, 8. Of 32 weights q, k and v
    # have 5, o has 3, gate, up and down have 24.
    bits = (5 * (6 + 24 / 64) + 3 * (4 + 20 / 64) + 24 * (3 + 20 / 64)) / 32
    assert rows["quantized"].bits_per_weight == pytest.approx(bits, abs=0.01)


def test_memory_of_the_build_is_bounded(artifact: Path, report: Report, smollm2_gguf: Path) -> None:
    # float32: 134,515,008 parameters, the tied table once.
    weights = 4 * 134_515_008
    assert report.build.peak_memory_bytes < weights + 2_000_000_000
    size = sum(path.stat().st_size for path in artifact.rglob("*") if path.is_file())
    assert size < smollm2_gguf.stat().st_size, "the folder is smaller than the file it is made from"


@pytest.mark.parametrize("prompt", PROMPTS)
def test_three_ways_of_running_agree(artifact: Path, report: Report, prompt: str) -> None:
    model = load(artifact)
    tokens = model.encode(prompt)
    ours = list(model.generate(tokens, NEW_TOKENS).tokens)

    # Unmodified GenAI finds the library in genai_config.json by itself.
    config = json.loads((artifact / "genai_config.json").read_text())
    options = config["model"]["decoder"]["session_options"]
    assert (artifact / options["custom_ops_library"]).is_file()
    ends = model.tokenizer.ends
    assert ours == until(genai_tokens(artifact, tokens, NEW_TOKENS), ends)
    assert len(ours) == NEW_TOKENS, "choose a prompt whose continuation is long enough"

    # The functions compute with float activations: a token is their best one too, or all but.
    gaps = stock_gaps(artifact, tokens, ours)
    assert max(gaps) < 2 * max(case["tolerance"] for case in report.parity["logits"])
    assert np.count_nonzero(gaps) < NEW_TOKENS / 8


def test_running_loads_no_torch_and_no_compiler(artifact: Path) -> None:
    done = python("-c", LOADED, artifact)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_verify_passes_and_finds_one_changed_byte(artifact: Path, tmp_path: Path) -> None:
    done = eoracc("verify", artifact)
    assert done.returncode == 0, done.stderr
    assert "parity: passed" in done.stdout
    damaged = Path(shutil.copytree(artifact, tmp_path / "damaged"))
    with (damaged / "model.onnx.data").open("r+b") as file:
        file.seek(50_000_000)
        byte = file.read(1)[0]
        file.seek(50_000_000)
        file.write(bytes([byte ^ 1]))
    for done in (eoracc("verify", damaged), eoracc("run", damaged, "hi")):
        assert (done.returncode, done.stdout) == (2, "")
        (sentence,) = done.stderr.splitlines()
        assert "model.onnx.data: its content is not what manifest.json says" in sentence
