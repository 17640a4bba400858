from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from eoracc.compiler.compare.plot import check_plot, draw
from eoracc.compiler.compare.result import Comparison, Figures, Original, Row
from eoracc.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.compiler.compare.methods import Family


def row(method: str, family: Family, megabytes: float, perplexity: float) -> Row:
    figures = Figures(
        perplexity=perplexity,
        perplexity_ood=None,
        kl=perplexity / 100,
        kl_ood=None,
        top1_agreement=0.5,
        bytes=3_000_000,
        folder_bytes=5_000_000,
        linear_bytes=int(megabytes * 1e6),
        bits_per_weight=16 * megabytes / 212.0,
        seconds=1.0,
        wall_s=1.0,
    )
    return Row(method=method, family=family, budget=f"{megabytes:g}", figures=figures)


def comparison(*rows: Row) -> Comparison:
    return Comparison(
        model="m",
        digest="d",
        through="compressed",
        calibration_tokens=1,
        windows=1,
        window_length=2,
        shared_s=0.0,
        original=Original(
            perplexity=23.92, perplexity_ood=None, bytes=4_000_000, linear_bytes=212_000_000
        ),
        rows=rows,
    )


ROWS = (
    row("eora", "compensation", 100, 26.0),
    row("eora", "compensation", 50, 30.0),
    Row(method="eora", family="compensation", budget="1", skipped="too small"),
    row("svd_llm", "factorization", 60, 1591.0),
    row("none", "quantization", 40, 36.0),
)


def test_a_drawing_names_methods_and_original(tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    draw(comparison(*ROWS), file)
    text = file.read_text()
    for word in (
        "eora",
        "svd_llm",
        "none",
        "original 23.92",
        "perplexity on held-out text",
        "KL from the original, nats per token",
        "MB of the compressed linears",
        "bits per weight",
    ):
        assert f">{word}</text>" in text
    # Perplexities differ by a factor of 60, sizes by less than three.
    ticks = re.findall(r">([\d.]+)</text>", text)
    assert {"50", "300", "500"} <= set(ticks)
    assert {"40", "60", "80", "100"} <= set(ticks)


@pytest.mark.parametrize("suffix", [".svg", ".png"])
def test_the_same_rows_give_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    contents = []
    for name in ("one", "two"):
        file = (tmp_path / name).with_suffix(suffix)
        draw(comparison(*ROWS), file)
        contents.append(file.read_bytes())
    assert contents[0] == contents[1]
    draw(comparison(*ROWS[1:]), file)
    assert file.read_bytes() != contents[0]
    assert contents[0].startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_an_outlier_does_not_flatten_the_others(tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    lost = row("svd", "factorization", 60, 3.6e8)
    assert lost.figures is not None
    lost = replace(lost, figures=replace(lost.figures, kl=17.0))
    draw(comparison(*ROWS, lost), file)
    text = file.read_text()
    # Thirty times the original's 23.92: the axis ends there, and both that are beyond are hollow.
    assert ">hollow: above 718</text>" in text
    ticks = {float(tick) for tick in re.findall(r">([\d.]+(?:e\+\d+)?)</text>", text)}
    assert {30, 50, 100, 500} <= ticks
    assert max(ticks) < 1000
    draw(comparison(*ROWS[:2], ROWS[4]), file)
    assert "hollow" not in file.read_text()
    # Where all have lost all sense there is nothing to make room for.
    draw(comparison(lost), file)
    assert "hollow" not in file.read_text()


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "plot.svg"
    draw(comparison(row("_mine", "recipe", 60, 30.0), row(r"a $\no$ b", "recipe", 60, 30.0)), file)
    text = file.read_text()
    assert "> _mine</text>" in text
    assert r">a $\no$ b</text>" in text


def test_one_row_is_enough(tmp_path: Path) -> None:
    draw(comparison(ROWS[0]), tmp_path / "plot.svg")


def test_plots_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_plot(tmp_path / "plot.PNG")
    with pytest.raises(ConfigError, match=r"plot\.pdf: a plot is drawn as \.svg or \.png"):
        check_plot(tmp_path / "plot.pdf")
    monkeypatch.setattr("eoracc.compiler.compare.plot.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"needs matplotlib.*: pip install 'eoracc\[plot\]'$"):
        check_plot(tmp_path / "plot.svg")
