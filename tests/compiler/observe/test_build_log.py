from __future__ import annotations

import io
import json
from typing import Any

import pytest

from eoracc.compiler.observe.build_log import build_log
from eoracc.compiler.observe.spans import listening, span, warn
from eoracc.compiler.progress import PassTimes, SilentProgress
from eoracc.errors import ConfigError
from eoracc.passes.compensate.eora import Eora


def records(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_phases_steps_and_warnings_are_lines_of_json() -> None:
    stream = io.StringIO()
    with build_log(stream) as log, listening(log), SilentProgress().phase("compress", 2) as phase:
        with PassTimes().measure(Eora(), "a.q_proj"):
            phase.advance("block 0")
        warn("few_tokens", "has\n3", "a.q_proj", {"tokens": 3.0})
        phase.advance("block 1")
    begin, first, warning, last, end, ok = records(stream)
    assert all({"time", "level"} <= set(record) for record in records(stream))
    assert (begin["event"], begin["stage"], begin["steps"]) == ("phase_begin", "compress", 2)
    assert (first["event"], first["done"], first["total"], first["note"]) == (
        "step",
        1,
        2,
        "block 0",
    )
    assert warning["level"] == "warning"
    assert warning["message"] == "has\n3"
    assert (warning["linear"], warning["figures"]) == ("a.q_proj", {"tokens": 3.0})
    assert last["done"] == 2
    assert end["event"] == "phase_end"
    assert end["wall_s"] >= 0
    assert (ok["event"], ok["level"]) == ("end", "info")


def test_the_last_record_says_what_failed() -> None:
    stream = io.StringIO()
    with (
        pytest.raises(ConfigError),
        build_log(stream) as log,
        listening(log),
        span("load", "phase"),
    ):
        raise ConfigError("model.yaml: is empty: fill it")
    *_, phase, end = records(stream)
    assert phase["failed"] == "ConfigError"
    assert (end["level"], end["message"]) == ("error", "model.yaml: is empty: fill it")


def test_steps_of_a_fast_phase_are_few() -> None:
    stream = io.StringIO()
    with build_log(stream) as log, listening(log), SilentProgress().phase("p", 1000) as phase:
        for _ in range(1000):
            phase.advance()
    steps = [record for record in records(stream) if record["event"] == "step"]
    assert len(steps) < 50
    assert steps[-1]["done"] == 1000
