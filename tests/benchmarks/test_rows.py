from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.rows import compare, show, write_json


def test_ratio_is_taken_within_rounds() -> None:
    # The machine was ten times slower in the second round; the ratio is 0.5 in all of them.
    row = compare("case", "peer", [1.0, 10.0, 2.0], [2.0, 20.0, 4.0], bar=0.6)
    assert row.ratio == 0.5
    assert row.holds is True
    assert row.ours_us == 2e6
    assert row.peer_us == 4e6


@pytest.mark.parametrize(("bar", "holds"), [(0.49, False), (0.5, True), (None, None)])
def test_bar_is_the_largest_ratio_that_holds(bar: float | None, holds: bool | None) -> None:
    assert compare("case", "peer", [1.0], [2.0], bar=bar).holds is holds


@pytest.mark.parametrize(("ours", "holds"), [(100, True), (101, False)])
def test_bar_may_ask_for_no_more_bytes(ours: int, holds: bool) -> None:
    row = compare(
        "case", "peer", [1.0], [2.0], bar=0.6, ours_bytes=ours, peer_bytes=100, no_more_bytes=True
    )
    assert row.holds is holds


def test_bandwidth_is_a_share_of_the_limit() -> None:
    row = compare("case", "peer", [2.0], [4.0], ours_bytes=10, peer_bytes=30, bandwidth=20.0)
    assert row.ours_bandwidth == 0.25
    assert row.peer_bandwidth == 0.375


def test_peer_that_was_not_run_leaves_the_bar_open() -> None:
    row = compare("case", "peer", [1.0], [], bar=0.5)
    assert (row.peer_us, row.ratio, row.holds) == (None, None, None)


def test_report_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [compare("decode", "other", [1.0], [2.0], bar=0.4)]
    missing = {"llama.cpp": "No module named 'llama_cpp'"}
    show(rows, {"threads": 2}, missing)
    printed = capsys.readouterr().out
    assert "not measured: llama.cpp: No module named 'llama_cpp'" in printed
    assert "NO" in printed
    write_json(tmp_path / "out.json", rows, {"threads": 2}, missing)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["missing"] == missing
    assert content["threads"] == 2
    keys = ("case", "ours_us", "peer", "peer_us", "ratio", "bar", "holds")
    assert [content["rows"][0][key] for key in keys] == [
        "decode",
        1e6,
        "other",
        2e6,
        0.5,
        0.4,
        False,
    ]
