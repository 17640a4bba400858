"""The rows that the plot and the benchmark use are those of the tables in the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.measured_perplexity import MeasuredRow, read_measured
from benchmarks.quality import PEERS

ROOT = Path(__file__).parents[2]
SUMMARY = "docs/results.md"

MEASURED = read_measured()
ROWS = [MEASURED.original, *(row for series in MEASURED.series for row in series.rows)]


def table_rows(page: str) -> list[list[str]]:
    """Cells of every table row of ``page``, without bold marks."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip().replace("**", "") for cell in line.strip().strip("|").split("|")]
        for line in lines
        if line.lstrip().startswith("|")
    ]


@pytest.mark.parametrize(
    "row", ROWS, ids=lambda row: f"{row.row[:24]}-{row.bits_per_weight}-{row.wiki}"
)
def test_every_row_is_in_the_table_that_it_names(row: MeasuredRow) -> None:
    figures = {row.row, f"{row.bits_per_weight:.2f}", f"{row.wiki:.2f}"}
    assert any(figures <= set(cells) for cells in table_rows(row.source))


@pytest.mark.parametrize("page", [SUMMARY, "README.md"])
def test_summaries_show_measured_rows(page: str) -> None:
    measured = {(f"{row.bits_per_weight:.2f}", f"{row.wiki:.2f}") for row in ROWS}
    shown = headline_rows(page)
    assert len(shown) >= 6
    for _, bits, _, perplexity, *_ in shown:
        assert (bits, perplexity) in measured


@pytest.mark.parametrize("page", [SUMMARY, "README.md"])
def test_summaries_count_the_megabytes_of_the_linears(page: str) -> None:
    for _, bits, megabytes, *_ in headline_rows(page):
        exact = float(bits) * MEASURED.linear_weights / 8e6
        rounding = 0.005 * MEASURED.linear_weights / 8e6 + 0.05  # of the bits, of the megabytes
        assert abs(float(megabytes) - exact) <= rounding


def headline_rows(page: str) -> list[list[str]]:
    """Rows of the first table of ``page`` that has bits, MB and perplexity."""
    rows = table_rows(page)
    start = next(i for i, cells in enumerate(rows) if cells[1:4] == ["bits", "MB", "perplexity"])
    shown = []
    for cells in rows[start + 2 :]:
        if len(cells) < 4 or not cells[1].replace(".", "").isdigit():
            break
        shown.append(cells)
    return shown


def test_the_benchmark_prints_every_peer() -> None:
    peers = [row for series in MEASURED.series if series.peer for row in series.rows]
    assert [row.system for row in PEERS["smollm2"]] == [row.row for row in peers]
    assert len(peers) == 17
