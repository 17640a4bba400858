from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner
from rich.console import Console

from eoracc.compiler.cli import main
from eoracc.compiler.commands.common import make_console
from eoracc.compiler.commands.compare import _fitting
from eoracc.compiler.compare import run as module
from eoracc.compiler.compare.result import Comparison
from tests.compiler.compare.test_plot import ROWS, comparison

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result
    from rich.table import Table

CONTENT: dict[str, Any] = {
    "model": "model",
    "calibration": {"text": "text.txt"},
    "passes": ["calibrate", "quantize_gptq", "eora"],
    "compare": {"methods": ["none", "eora"], "budgets": [3.5, "30%"]},
    "output": "out",
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the comparison was asked for, which is not made."""
    asked: dict[str, Any] = {}

    def compare(config: object, methods: object, budgets: object, **others: Any) -> Comparison:  # noqa: ANN401
        asked.update(config=config, methods=methods, budgets=budgets, **others)
        return comparison(*ROWS)

    monkeypatch.setattr(module, "compare", compare)
    return asked


@pytest.fixture
def model_yaml(tmp_path: Path) -> Path:
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump(CONTENT))
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


def test_table_json_and_plot(model_yaml: Path, tmp_path: Path, asked: dict[str, Any]) -> None:
    rows, plot = tmp_path / "rows.json", tmp_path / "plot.svg"
    result = run(model_yaml, "--json", rows, "--plot", plot, "--set", "calibration.samples=3")
    assert result.exit_code == 0, result.output
    assert (asked["methods"], asked["budgets"]) == (["none", "eora"], ["3.5", "30%"])
    assert asked["config"].calibration.samples == 3
    assert asked["config_dir"] == tmp_path
    assert asked["fresh"] is False
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert "original 16.00 212.0 MB 23.92 0.0000" in lines
    assert "eora 50 3.77 50.0 MB 5.0 MB 30.00 0.3000 1.0" in lines
    assert "skipped: eora at 1: too small" in lines
    assert f"wrote {plot}" in lines
    content = json.loads(rows.read_text())
    assert len(content["rows"]) == len(ROWS)
    for found in content["rows"]:
        assert {
            "method",
            "budget",
            "perplexity",
            "perplexity_ood",
            "kl",
            "bytes",
            "seconds",
        } <= set(found)
    assert content["rows"][1]["perplexity"] == 30.0
    assert plot.read_text().startswith("<?xml")


def test_options_win_over_the_file(model_yaml: Path, asked: dict[str, Any]) -> None:
    result = run(model_yaml, "--methods", " svd, lqer ", "--budgets", "4.0,25%", "--fresh")
    assert result.exit_code == 0, result.output
    assert (asked["methods"], asked["budgets"]) == (["svd", "lqer"], ["4", "25%"])
    assert asked["fresh"] is True


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--methods", "eroa"], "there is no method 'eroa': did you mean 'eora'?"),
        (["--budgets", "3,much"], "'much' is no budget: give bits per weight, 3.5, the share"),
        (["--set", "compare.ood.windows=2"], "compare.ood: needs a text of its own: give 'text"),
        (["--set", "compare.budgets=[0]"], "compare.budgets.0: 0 is no budget: give bits per"),
        (["--plot", "plot.pdf"], "plot.pdf: a plot is drawn as .svg or .png: name it so"),
        (["--json", "no/rows.json"], "no/rows.json: there is no folder no: make it first"),
        (["--json", "."], ".: is a folder: give the name of a file"),
        (["--json", "a.svg", "--plot", "./a.svg"], "a.svg: --json and --plot name the same file"),
    ],
)
def test_mistakes_are_told_before_any_work(
    model_yaml: Path, asked: dict[str, Any], arguments: list[str], sentence: str
) -> None:
    result = run(model_yaml, *arguments)
    assert (result.exit_code, result.stdout, asked) == (2, "", {})
    assert sentence in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_a_file_that_cannot_be_written(
    model_yaml: Path, asked: dict[str, Any], option: str, tmp_path: Path
) -> None:
    result = run(model_yaml, option, "/proc/rows.svg")
    assert (result.exit_code, result.stdout) == (2, "")
    assert asked  # there is no way to tell before
    assert result.stderr.startswith("error: /proc/rows.svg: cannot be written: ")
    assert result.stderr.endswith("run the same command again with another file\n")
    asked.clear()
    (tmp_path / "locked").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "access", lambda path, _: path != tmp_path / "locked")
        result = run(model_yaml, option, tmp_path / "locked" / "rows.svg")
    assert (result.exit_code, asked) == (2, {})
    assert result.stderr.endswith("rows.svg: cannot be written: give another file\n")


def test_nothing_is_left_of_a_file_that_was_cut_off(
    model_yaml: Path, asked: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Comparison, file: Path) -> None:
        file.write_text("<svg")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("eoracc.compiler.compare.plot.draw", full)
    result = run(model_yaml, "--plot", tmp_path / "plot.svg")
    assert result.exit_code == 2
    assert asked
    assert "plot.svg: cannot be written: No space left on device: the rows are kept" in (
        result.stderr
    )
    assert not (tmp_path / "plot.svg").exists()


def test_a_pipe_sees_every_figure() -> None:
    long = [
        replace(one, method="a name that nobody would give to anything, or is it") for one in ROWS
    ]
    console = make_console()
    assert not console.is_terminal
    text = printed(_fitting(comparison(*long), console), console)
    assert "…" not in text
    assert f"{long[0].method} 100 7.55 100.0 MB" in text


@pytest.mark.parametrize(
    ("width", "missing"),
    [
        (96, []),
        (95, ["linears"]),
        (85, ["linears", "folder"]),
        (77, ["linears", "folder", "CPU s"]),
        (30, ["linears", "folder", "CPU s", "spent on", "budget"]),
    ],
)
def test_a_narrow_terminal_does_without_some_columns(width: int, missing: list[str]) -> None:
    ranked = [replace(ROWS[0], method="a rather long name of a method", rank=192), *ROWS[1:]]
    console = Console(file=io.StringIO(), force_terminal=True, width=width, no_color=True)
    text = printed(_fitting(comparison(*ranked), console), console)
    heading = next(line for line in text.splitlines() if "perplexity" in line and "KL" in line)
    shown = ["budget", "spent on", "bits", "linears", "folder", "perplexity", "KL", "CPU s"]
    assert [name for name in shown if name not in heading] == [
        name for name in shown if name in missing
    ]
    assert "…" not in text
    assert "26.00" in text
    # Folded, not cut off.
    assert "a rather long name" in text
    assert "of a method" in text


def printed(table: Table, console: Console) -> str:
    with console.capture() as capture:
        console.print(table)
    return "\n".join(" ".join(line.split()) for line in capture.get().splitlines())


def test_an_interruption_says_that_it_goes_on(
    model_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> Comparison:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "compare", interrupted)
    result = run(model_yaml, "--json", "rows.json")
    assert result.exit_code == 130
    assert result.stderr.startswith("error: interrupted: run the same command again to go on")


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        (
            {"mine": ["calibrate", {"erc_svd": {"rato": 0.3}}]},
            "compare.methods.mine.1.erc_svd.rato: unknown key: did you mean 'ratio'?",
        ),
        (
            {"mine": ["erc_svd"]},
            "compare.methods.mine.0.erc_svd: needs 'calibrate' before it: put it above",
        ),
        ({"mine": []}, "compare.methods.mine: must not be empty"),
        (["eroa"], "compare.methods.eroa: there is no such method: did you mean 'eora'?"),
    ],
)
def test_sections_with_mistakes(model_yaml: Path, methods: object, sentence: str) -> None:
    model_yaml.write_text(yaml.safe_dump(CONTENT | {"compare": {"methods": methods}}))
    result = run(model_yaml)
    assert result.exit_code == 2
    assert sentence in result.stderr
    assert f"{model_yaml}:" in result.stderr
