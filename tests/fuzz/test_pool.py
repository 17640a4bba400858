"""The processes that run cases see every kind of fault, and go on after it."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz.kinds import FAULTY
from tests.fuzz.pool import FAULTS, Case, run_cases


def test_every_fault_is_seen_and_survived(tmp_path: Path) -> None:
    templates, work = tmp_path / "templates", tmp_path / "work"
    (templates / "chat").mkdir(parents=True)
    (templates / "chat" / "body.json").write_text('{"n": 1}')
    work.mkdir()
    cases = [Case(kind, 0) for kind in (*FAULTY, "traceback")]
    seen = list(run_cases(templates, work, cases, seed=0, hang_s=3.0))
    assert [outcome.case for outcome in seen] == cases
    expected = [case.kind.removeprefix("busy ") for case in cases]
    assert [outcome.verdict for outcome in seen] == expected
    assert {*expected, "lie"} == set(FAULTS)
    assert "KeyError: 'a field'" in seen[0].detail
    assert seen[1].detail == "SIGKILL"
