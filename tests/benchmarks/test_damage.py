from __future__ import annotations

from itertools import cycle
from pathlib import Path

from benchmarks.damage import tries


def test_every_file_is_tried_and_the_first_of_a_kind_several_times() -> None:
    names = ["0/operands-00004", "0/operands-00008", "1/operands-00004", "0/state.json"]
    found = list(tries([Path(name) for name in names], cycle("abc"), 3))
    first, second, third, fourth = (Path(name) for name in names)
    assert found == [
        *((first, damage) for damage in "abc"),
        (second, "a"),
        (third, "b"),
        *((fourth, damage) for damage in "cab"),
    ]
