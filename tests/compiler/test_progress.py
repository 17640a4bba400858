from __future__ import annotations

import io

import pytest
from rich.console import Console

from eoracc.compiler.progress import ConsoleProgress, SilentProgress


def test_silent_progress_measures() -> None:
    silent = SilentProgress()
    with silent.phase("load", 2) as phase:
        phase.advance()
        phase.advance("block 1")
    with silent.phase("compress", 0):
        pass
    assert [time.name for time in silent.times] == ["load", "compress"]
    assert all(time.wall_s >= 0 and time.cpu_s >= 0 for time in silent.times)


def test_phase_that_fails_is_not_recorded_as_done() -> None:
    silent = SilentProgress()
    with pytest.raises(KeyboardInterrupt), silent.phase("load", 1):
        raise KeyboardInterrupt
    assert silent.times == []


def test_few_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("eoracc.compiler.progress.time.monotonic", lambda: now[0])
    file = io.StringIO()
    shown = ConsoleProgress(Console(file=file, force_terminal=False))
    with shown.phase("compress", 100) as phase:
        for block in range(100):
            now[0] += 0.3
            phase.advance(f"block {block}")
    lines = file.getvalue().splitlines()
    assert lines == [
        "compress: 100 steps",
        "compress: 34/100 (block 33), about 20 s left",
        "compress: 68/100 (block 67), about 10 s left",
        "compress: done in 30.0 s",
    ]
    assert [time.name for time in shown.times] == ["compress"]


def test_steps_of_an_earlier_run_say_nothing_about_the_time_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr("eoracc.compiler.progress.time.monotonic", lambda: now[0])
    file = io.StringIO()
    with ConsoleProgress(Console(file=file, force_terminal=False)).phase("compress", 100) as phase:
        for _ in range(80):
            now[0] += 0.01
            phase.skip()
        for _ in range(4):
            now[0] += 6
            phase.advance()
    assert file.getvalue().splitlines()[1:3] == [
        "compress: 82/100, about 108 s left",
        "compress: 84/100, about 96 s left",
    ]


def test_a_bar_counts_the_steps_of_an_earlier_run() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120, color_system=None)
    with ConsoleProgress(console).phase("compress", 3) as phase:
        phase.skip()
        phase.skip()
        phase.advance("block 1")
    assert "3/3" in file.getvalue()


def test_bar_on_a_terminal_shows_steps_and_note() -> None:
    file = io.StringIO()
    shown = ConsoleProgress(Console(file=file, force_terminal=True, width=120, color_system=None))
    with shown.phase("compress", 2) as phase:
        phase.advance("block 0")
        phase.advance("block 1")
    assert "compress" in file.getvalue()
    assert "2/2" in file.getvalue()
