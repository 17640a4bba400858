from __future__ import annotations

from pathlib import Path

from benchmarks.measured_perplexity import read_measured
from benchmarks.plot_perplexity import draw, source_digest

PLOT = Path(__file__).parents[2] / "docs" / "perplexity_by_size.svg"


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    files = [tmp_path / "first.svg", tmp_path / "second.svg"]
    for file in files:
        draw(read_measured(), file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].stat().st_size < 100_000


def test_a_png_is_drawn_too(tmp_path: Path) -> None:
    draw(read_measured(), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_plot_in_the_documentation_is_up_to_date() -> None:
    text = PLOT.read_text(encoding="utf-8")
    assert len(text) < 100_000
    assert source_digest() in text, (
        "measured_perplexity.json has changed: run "
        "python -m benchmarks.plot_perplexity docs/perplexity_by_size.svg"
    )
