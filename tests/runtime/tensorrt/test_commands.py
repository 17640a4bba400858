"""``eoracc run``, ``verify`` and ``bench`` on an artifact with engines, here and without a GPU."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner, Result

from eoracc.compiler.cli import main
from eoracc.runtime.bench import start
from eoracc.runtime.bench.start import Start
from eoracc.runtime.parity.record import PARITY_FILE, ParityCase, ParityRecord
from tests.runtime.tensorrt.engine_artifact import Oracle, write_engine_artifact
from tests.tiny_artifact import reseal

if TYPE_CHECKING:
    from pathlib import Path

    from tests.runtime.tensorrt.machine import Machine

IDS = np.array([[5, 17, 200, 31, 8, 90, 44, 3, 9], [120, 7, 61, 4, 8, 1, 0, 0, 0]])
MASK = np.array([[1] * 9, [1] * 6 + [0] * 3])
DECODED = np.array([[5, 17, 200, 31, 8, 90, 44], [120, 7, 61, 4, 8, 1, 30]])


def cases(oracle: Oracle) -> list[ParityCase]:
    """A padded batch in chunks, and one that is decoded; the very logits of whole texts."""
    found = []
    for name, ids, mask, chunks in (
        ("padded", IDS, MASK, (4, 5)),
        ("decoded", DECODED, np.ones_like(DECODED), (5, 1, 1)),
    ):
        rows, columns = np.nonzero(mask)
        whole = [
            oracle.logits(row[:length].tolist())
            for row, length in zip(ids, mask.sum(1), strict=True)
        ]
        logits = np.stack([whole[row][column] for row, column in zip(rows, columns, strict=True)])
        case = ParityCase(name, ids, mask, chunks, rows, columns, logits, 1e-4, rounding=1e-3)
        found.append(case)
    return found


@pytest.fixture(scope="module")
def artifact(libcuda: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With engines alone, as a build for ``tensorrt_rtx`` alone writes it."""
    folder = write_engine_artifact(
        tmp_path_factory.mktemp("engines"), libcuda, adapter_type="none", adapters=False
    )
    record = ParityRecord({}, [], cases(Oracle(folder)), compression_effect=1.0)
    record.save(folder / "tensorrt_rtx" / PARITY_FILE)
    (folder / "model.onnx").unlink()
    (folder / "model.onnx.data").unlink()
    reseal(folder)
    return folder


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments), "--trust"])


def test_run_tells_what_runs_it(artifact: Path, machine: Machine) -> None:
    del machine
    result = invoke("run", artifact, "a state", "--max-new-tokens", "4", "--no-chat")
    assert result.exit_code == 0, result.output
    assert result.stderr == "running with tensorrt_rtx on Stand-in GPU, compute capability 8.6\n"
    as_json = invoke("run", artifact, "a state", "--max-new-tokens", "4", "--no-chat", "--json")
    found = json.loads(as_json.stdout)
    assert (found["backend"], found["text"]) == ("tensorrt_rtx", result.stdout.rstrip("\n"))


def test_engines_are_executed_only_where_trusted(artifact: Path, machine: Machine) -> None:
    del machine
    for command in (["run", str(artifact), "x"], ["bench", str(artifact)]):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2
        assert "sm86.engine: is code of the artifact's builder" in result.stderr
        assert "add --trust (trust=True) if you trust the builder" in result.stderr
    verified = CliRunner().invoke(main, ["verify", str(artifact)])
    assert "engines of tensorrt_rtx: not run: " in verified.stdout
    assert "add --trust" in verified.stdout


def test_verify_runs_the_engines(artifact: Path, machine: Machine) -> None:
    del machine
    result = invoke("verify", artifact)
    assert result.exit_code == 0, result.output
    line = result.stdout.splitlines()[-1]
    assert line.startswith(
        "engines of tensorrt_rtx on Stand-in GPU, compute capability 8.6: passed, largest deviation"
    )
    found = json.loads(invoke("verify", artifact, "--backend", "tensorrt_rtx", "--json").stdout)
    (engines,) = found["engines"]
    assert engines["passed"] is found["passed"] is True
    assert [case["name"] for case in engines["logits"]] == ["padded", "decoded"]
    for case in engines["logits"]:
        assert case["tolerance"] == pytest.approx(1e-4 + 1e-3), "what rounding does is allowed"
        assert case["max_error"] < 1e-4


def test_verify_fails_where_an_engine_is_off(
    artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    del machine
    plain = ParityRecord.load(artifact / "tensorrt_rtx" / PARITY_FILE)
    assert {case.rounding for case in plain.cases} == {1e-3}
    last = plain.cases[1].logits.copy()
    last[-1, 7] += 2e-3
    off = [plain.cases[0], replace(plain.cases[1], logits=last)]
    monkeypatch.setattr(ParityRecord, "load", lambda _: replace(plain, cases=off))
    result = invoke("verify", artifact, "--json")
    assert result.exit_code == 1
    (engines,) = json.loads(result.stdout)["engines"]
    assert [case["passed"] for case in engines["logits"]] == [True, False]


def test_machine_without_a_gpu(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eoracc.runtime.tensorrt.cuda._LIBRARIES", ("libcuda-that-is-not.so",))
    for command in (("run", "x"), ("bench",)):
        result = invoke(command[0], artifact, *command[1:])
        assert result.exit_code == 2
        assert result.stderr.startswith("error: no NVIDIA driver is found on this machine: ")
        assert result.stderr.count("\n") == 1
    verified = invoke("verify", artifact)
    assert verified.exit_code == 0, "the graph can be checked anywhere"
    assert verified.stdout.splitlines()[-1].startswith(
        "engines of tensorrt_rtx: not run: no NVIDIA driver is found"
    )
    asked = invoke("verify", artifact, "--backend", "tensorrt_rtx")
    assert asked.exit_code == 2
    assert asked.stderr.startswith("error: no NVIDIA driver is found")


def test_bench(artifact: Path, machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the start in a process of its own, which the stand-ins do not reach."""
    del machine
    started = []

    def measure(folder: Path, **options: object) -> Start:
        started.append((folder, options["backend"]))
        return Start(1.0, 2, 3, 1 << 20)

    monkeypatch.setattr(start, "measure_start", measure)
    monkeypatch.setattr("eoracc.runtime.bench.benchmark.measure_start", measure)
    few = ("--prompt-tokens", "20", "--new-tokens", "3", "--repeats", "2")
    found = json.loads(invoke("bench", artifact, *few, "--json").stdout)
    assert found["backend"] == "tensorrt_rtx"
    assert found["device"] == "Stand-in GPU, compute capability 8.6"
    assert started == [(artifact, "tensorrt_rtx")]
    assert found["start"]["device_memory_bytes"] == 1 << 20
    assert all(one["tokens_per_s"]["median"] > 0 for one in found["batches"])
    shown = invoke("bench", artifact, *few).stdout
    assert "tensorrt_rtx on Stand-in GPU, compute capability 8.6; median of 2" in shown
    assert "memory of the GPU after that: 1.0 MB" in shown
