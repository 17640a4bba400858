"""Multiple choice on SmolLM2: lm-eval and our benchmark on an artifact, PyTorch on the original."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.eager_choices import open_eager
from benchmarks.multiple_choice import artifact_system, correct, score_all
from benchmarks.question_sets import encode_choices, load_questions, write_tasks

pytestmark = pytest.mark.real

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "smollm2"
QUESTIONS = 6
"""Of each set: enough to compare the ways of scoring, far too few for an accuracy."""


@pytest.fixture(scope="module")
def artifact(smollm2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """8 bits, no calibration: the original, nearly."""
    from eoracc.compiler.config.load import load_config
    from eoracc.compiler.driver import build
    from eoracc.compiler.progress import SilentProgress

    folder = tmp_path_factory.mktemp("build")
    settings = {
        "model": str(smollm2_folder),
        "passes": [{"quantize_rtn": {"bits": 8, "group_size": 32, "embedding_bits": None}}],
        "onnxruntime": {"accuracy_level": 0},
        "verify": {"text": str(EXAMPLE / "data" / "speeches-2000-2024.txt"), "windows": 1},
        "output": "artifact",
    }
    (folder / "model.yaml").write_text(json.dumps(settings))
    config = load_config(folder / "model.yaml")
    return build(config, config_dir=folder, progress=SilentProgress()).output


def test_lm_eval_agrees_with_the_benchmark_question_by_question(
    artifact: Path, smollm2_folder: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    questions = load_questions(tmp_path, limit=QUESTIONS)
    tasks = write_tasks(questions, tmp_path / "tasks")
    command = [
        *("--model", "eoracc", "--model_args", f"pretrained={artifact}", "--batch_size", "8"),
        *("--include_path", tmp_path / "tasks", "--tasks", ",".join(tasks)),
        *("--output_path", tmp_path / "results", "--log_samples"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "eoracc.runtime.lm_eval", *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    ours = score_all([artifact_system("ours", artifact, None)], questions, tmp_path)["ours"]
    original = open_eager(smollm2_folder)
    errors, signals = [], []
    tokenizer = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    for name, asked in questions.items():
        (path,) = (tmp_path / "results").rglob(f"samples_eoracc_{name}_*.jsonl")
        lines = sorted(
            map(json.loads, path.read_text().splitlines()), key=lambda one: one["doc_id"]
        )
        for question, line, scores in zip(asked, lines, ours[name], strict=True):
            theirs = [float(score) for (score, _), *_ in line["resps"]]
            tokens = [len(one.tokens) - one.start for one in encode_choices(tokenizer, question)]
            # Only who shares a batch differs: 30 layers of 4 products, of at most 1,536 terms.
            tolerance = np.array(tokens) * 120 * np.sqrt(1536) * 2.0**-24
            assert (np.abs(np.subtract(theirs, scores)) <= tolerance).all()
            expected = np.array(original(question))
            assert tolerance.max() < 1e-2 * np.ptp(expected)
            errors.append(scores - expected)
            signals.append(expected - expected.mean())
        for rule, metric in (("plain", "acc"), ("normalized", "acc_norm")):
            hits = correct(asked, ours[name], rule)
            assert [bool(line[metric]) for line in lines] == hits.tolist()
    # What 8 bits change is far below what tells the choices apart.
    assert np.std(np.concatenate(errors)) < 0.1 * np.std(np.concatenate(signals))
