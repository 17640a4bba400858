from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from eoracc.compiler.cli import main
from tests.tiny_build import tiny_config, tiny_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_workspace(tmp_path_factory.mktemp("observed"))
    verify = {"windows": 1, "window_length": 16, "parity": False}
    content = tiny_config(verify=verify).resolved()
    (folder / "model.yaml").write_text(yaml.safe_dump(content))
    return folder


def build(workspace: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["build", str(workspace / "model.yaml"), *options])


def events(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return found


def test_a_build_with_trace_and_log(workspace: Path) -> None:
    trace = workspace / "trace.json"
    result = build(workspace, "--trace", str(trace), "--log-format", "json", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)["report"]
    begun = [event for event in events(trace) if event["ph"] == "B"]
    ended = [event for event in events(trace) if event["ph"] == "E"]
    assert len(begun) == len(ended)
    phases = [event["name"] for event in begun if event["cat"] == "phase"]
    assert phases == [phase["name"] for phase in report["build"]["phases"]]
    assert [event["name"] for event in begun if event["cat"] == "stage"] == [
        "calibrate+quantize_gptq+eora"
    ]
    groups = {event["args"]["linears"] for event in begun if event["name"] == "eora"}
    named = {name for group in groups for name in group.split(", ")}
    assert named == {linear["name"] for linear in report["linears"]}
    assert {event["cat"] for event in begun} == {"phase", "stage", "pass", "forward", "session"}
    # One source: the processor time of a pass is the sum of its spans.
    total = {entry["name"]: entry["cpu_s"] for entry in report["build"]["passes"]}
    assert sum(e["args"]["cpu_s"] for e in ended if e["cat"] == "pass") == pytest.approx(
        sum(total.values()), abs=1e-3
    )
    records = [json.loads(line) for line in result.stderr.splitlines()]
    assert records[-1]["event"] == "end"
    logged = {
        (record["code"], record["linear"]) for record in records if record["event"] == "warning"
    }
    assert logged == {(entry["code"], entry["linear"]) for entry in report["warnings"]}
    assert logged


def test_a_failed_build_leaves_a_trace(workspace: Path) -> None:
    trace = workspace / "failed.json"
    result = build(
        workspace, "--set", "calibration.samples=9999", "--set", "output=o", "--trace", str(trace)
    )
    assert result.exit_code == 2
    assert {event["name"] for event in events(trace) if event["ph"] == "B"} >= {"load", "check"}


def test_a_trace_that_cannot_be_written_is_refused_before_any_work(workspace: Path) -> None:
    result = build(workspace, "--set", "output=o", "--trace", str(workspace))
    assert result.exit_code == 2
    assert "cannot be written: Is a directory: give --trace another file" in result.stderr
    assert "load" not in result.stderr
