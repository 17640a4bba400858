"""``python -m eoracc.runtime.lm_eval`` as a user runs it, with no network."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.multiple_choice import artifact_system, correct, score_all
from benchmarks.question_sets import Question, write_tasks

QUESTIONS = {
    "sky": [
        Question("Question: What colour is the sky?\nAnswer:", ("blue", "a cup of tea", "no"), 0),
        Question("Question: And grass? \nAnswer:", ("red", "green"), 1),
        Question("Zähle:", ("eins, zwei", "drei"), 0),
    ],
    "sums": [Question("1 + 1 =", ("2", "11", "1 1"), 0)],
}

OFFLINE = """
import runpy, socket, sys

attempts = sys.argv.pop(1)  # before lm-eval changes the arguments

def refuse(*arguments, **options):
    with open(attempts, "a") as file:
        file.write(f"{arguments}\\n")
    raise OSError("no network in this test")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
sys.argv[0] = "lm_eval"
runpy.run_module("eoracc.runtime.lm_eval", run_name="__main__", alter_sys=False)
"""
"""Runs the module; accesses to the network are recorded and refused."""


def lm_eval(work: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own, with caches of its own.

    Without the count of downloads that ``datasets`` sends, for files on this machine too.
    """
    attempts = work / "attempts"
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, attempts, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HOME": str(work / "hf"), "HF_UPDATE_DOWNLOAD_COUNTS": "0"},
    )
    assert not attempts.exists(), attempts.read_text()
    return done


def test_the_command_line_agrees_with_our_own_accuracy(tiny_artifact: Path, tmp_path: Path) -> None:
    tasks = write_tasks(QUESTIONS, tmp_path / "tasks")
    done = lm_eval(
        tmp_path,
        "--model",
        "eoracc",
        "--model_args",
        f"pretrained={tiny_artifact}",
        "--include_path",
        tmp_path / "tasks",
        "--tasks",
        ",".join(tasks),
        "--output_path",
        tmp_path / "results",
        "--log_samples",
    )
    assert done.returncode == 0, done.stderr
    system = artifact_system("ours", tiny_artifact, None)
    scores = score_all([system], QUESTIONS, tmp_path)["ours"]
    for name, questions in QUESTIONS.items():
        (path,) = (tmp_path / "results").rglob(f"samples_eoracc_{name}_*.jsonl")
        samples = sorted(
            map(json.loads, path.read_text().splitlines()), key=lambda one: one["doc_id"]
        )
        theirs = [[float(score) for (score, _), *_ in one["resps"]] for one in samples]
        for one, other in zip(theirs, scores[name], strict=True):
            # What shares a batch moves the last bits: 2 layers of 7 products of 88 terms at most.
            assert one == pytest.approx(other, abs=100 * 2 * 7 * 88 * 2.0**-24)
        for rule, metric in (("plain", "acc"), ("normalized", "acc_norm")):
            hits = correct(questions, scores[name], rule)
            assert [one[metric] for one in samples] == hits.tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("pretrained=/nowhere", "error: /nowhere: there is no such folder"),
        ("pretrained={artifact},adapter=math", "error: adapter 'math': the artifact takes no"),
    ],
)
def test_a_bad_argument_is_one_sentence(
    tiny_artifact: Path, tmp_path: Path, arguments: str, message: str
) -> None:
    write_tasks(QUESTIONS, tmp_path / "tasks")
    model_args = arguments.format(artifact=tiny_artifact)
    done = lm_eval(
        tmp_path,
        *("--model", "eoracc", "--model_args", model_args),
        *("--include_path", tmp_path / "tasks", "--tasks", "eoracc_sums"),
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
