from __future__ import annotations

import pytest

from eoracc.compiler.kept.interval import SaveInterval


def test_saves_are_ten_seconds_apart_and_take_two_hundredths_of_the_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [100.0]
    monkeypatch.setattr("eoracc.compiler.kept.interval.time.monotonic", lambda: now_s[0])
    interval = SaveInterval()

    def due_after(seconds: float) -> bool:
        now_s[0] += seconds
        return interval.is_due

    def save(seconds: float) -> None:
        with interval.saving():
            now_s[0] += seconds

    assert [due_after(9.9), due_after(0.2)] == [False, True]
    save(0.1)
    assert [due_after(9.9), due_after(0.2)] == [False, True]
    save(3.0)
    assert [due_after(149.9), due_after(0.2)] == [False, True]
