from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from eoracc.compiler.observe.spans import listening, span, step, warn
from eoracc.compiler.observe.trace import Trace
from eoracc.errors import ConfigError


def events(path: Path) -> list[dict[str, Any]]:
    content = json.loads(path.read_text())
    found: list[dict[str, Any]] = content["traceEvents"]
    return found


def test_spans_samples_and_warnings(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(path, interval_s=0.01) as trace, listening(trace):
        with span("compress", "phase", steps=2), span("eora", "pass", linears="a, b") as inner:
            warn("few_tokens", "has 3", "a", {"tokens": 3.0})
            step("compress", 1, 2, "block 0")
        assert json.loads(path.read_text())  # while it is open
    assert trace.problem is None
    found = events(path)
    assert {event["pid"] for event in found} == {os.getpid()}
    main = [event for event in found if event["ph"] in "BEi"]
    assert [(event["ph"], event.get("name")) for event in main] == [
        ("B", "compress"),
        ("B", "eora"),
        ("i", "few_tokens"),
        ("E", None),
        ("E", None),
    ]
    assert main[1]["args"] == {"linears": "a, b"}
    assert main[2]["args"] == {"message": "has 3", "linear": "a", "tokens": 3.0}
    took_us = main[3]["ts"] - main[1]["ts"]
    assert took_us == pytest.approx(1e6 * inner.wall_s, abs=0.2)  # rounded to 0.1 each
    counters = {event["name"]: event["args"] for event in found if event["ph"] == "C"}
    assert counters["memory"]["resident_mb"] > 1
    assert counters["threads"]["threads"] >= 2


def test_an_exception_ends_its_spans(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with (
        pytest.raises(KeyboardInterrupt),
        Trace(path) as trace,
        listening(trace),
        span("compress", "phase"),
        span("eora", "pass"),
    ):
        raise KeyboardInterrupt
    ends = [event["args"]["failed"] for event in events(path) if event["ph"] == "E"]
    assert ends == ["KeyboardInterrupt", "KeyboardInterrupt"]


def test_a_killed_process_leaves_json(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    program = f"""
import os, signal
from pathlib import Path
from eoracc.compiler.observe.spans import listening, span
from eoracc.compiler.observe.trace import Trace
with Trace(Path({str(path)!r}), interval_s=0.001) as trace, listening(trace), span("p", "phase"):
    for index in range(500):
        with span(f"pass {{index}}", "pass"):
            pass
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -signal.SIGKILL
    names = [event.get("name") for event in events(path) if event["ph"] == "B"]
    assert names == ["p", *(f"pass {index}" for index in range(500))]


def test_a_large_model_ends_in_a_file_of_bounded_size(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(path, most_events=20) as trace, listening(trace), span("compress", "phase"):
        for _ in range(50):
            with span("é" * 10_000, "pass"):
                warn("code", "x" * 10_000, None, {})
    # A turn has a span of two events and a warning: of the seventh only the span has room.
    assert trace.problem == "87 events are left out"
    found = events(path)
    begun = [event for event in found if event["ph"] == "B"]
    ended = [event for event in found if event["ph"] == "E"]
    assert len(begun) == len(ended) < 15
    assert begun[0]["name"] == "compress"
    assert ended[-1]["cat"] == "phase"
    assert path.stat().st_size < 40_000


def test_samples_become_rare(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    with Trace(path, interval_s=0.001, most_samples=3) as trace, listening(trace):
        import time

        time.sleep(0.3)
    samples = [event for event in events(path) if event["name"] == "memory"]
    # 3 samples at each of 1, 2, 4, ... ms: 0.3 s end in the eighth interval.
    assert 3 < len(samples) <= 24


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--trace another file"):
        Trace(tmp_path)
    with pytest.raises(ConfigError, match="No such file"):
        Trace(tmp_path / "missing" / "trace.json")


def test_only_a_trace_is_replaced(tmp_path: Path) -> None:
    config, trace = tmp_path / "config.json", tmp_path / "trace.json"
    config.write_text("{}")
    with pytest.raises(ConfigError, match=r"config\.json: exists and is no trace"):
        Trace(config)
    assert config.read_text() == "{}"
    for left in ("", '{"displayTimeUnit": "ms", "traceEvents": [\n' + 5000 * " "):
        trace.write_text(left)
        with Trace(trace):
            pass
        assert isinstance(events(trace), list)
        assert trace.stat().st_size < 5000


def test_a_full_disk_ends_the_trace_and_not_the_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, write = tmp_path / "trace.json", os.pwrite
    left = [6]

    def pwrite(file: int, content: bytes, offset: int) -> int:
        left[0] -= 1
        if left[0] == 0:
            return write(file, content[:7], offset)
        return write(file, content, offset)

    with Trace(path, interval_s=60) as trace, listening(trace):
        with span("compress", "phase"):
            monkeypatch.setattr(os, "pwrite", pwrite)
            for _ in range(20):
                with span("eora", "pass"):
                    pass
        monkeypatch.undo()
    assert trace.problem == "cannot be written: No space left on device"
    assert len([event for event in events(path) if event["ph"] == "B"]) in (3, 4)
