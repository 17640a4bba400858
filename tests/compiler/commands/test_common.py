from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from rich.table import Table

from eoracc.compiler.commands import common
from eoracc.compiler.commands.common import make_console, make_table, print_json, print_text, say
from eoracc.compiler.progress import ConsoleProgress

HOSTILE = "\x1b[2J\x1b]0;title\x07[red]a[/red] :smile:\u202eb\x9b1m\x7f"
SHOWN = "\\x1b[2J\\x1b]0;title\\x07[red]a[/red] :smile:\\u202eb\\x9b1m\\x7f"
COMMANDS = Path(common.__file__).parent


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"{HOSTILE}\nerror: forged")
    say(HOSTILE, err=True)
    said = capsys.readouterr()
    assert said.out == f"{SHOWN}\\nerror: forged\n"
    assert said.err == f"{SHOWN}\n"


def test_tables_show_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    table: Table = make_table(HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(HOSTILE)
    make_console().print(table)
    printed = capsys.readouterr().out
    assert printed.count(SHOWN) == 3
    assert printed.replace("\n", "").isprintable()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_notes_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
    with ConsoleProgress(make_console(err=True)).phase(HOSTILE, 2) as phase:
        phase.advance(HOSTILE)
    said = capsys.readouterr().err
    # The bar may cut what does not fit.
    assert SHOWN[:40] in said
    assert "\x1b]0;" not in said
    assert "\u202e" not in said


def test_json_prints_on_any_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    content = {HOSTILE: ["\ud800", "größe", "\U000e0001"]}
    print_json(content)
    printed = capsys.readouterr().out
    assert printed.replace("\n", "").isprintable()
    assert "größe" in printed
    assert json.loads(printed) == content


@pytest.mark.parametrize("terminal", [True, False])
def test_text_of_a_model_is_raw_in_a_pipe_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *, terminal: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    text = "\x1b[2J\t\u200d\n"
    print_text(text)
    assert capsys.readouterr().out == ("\\x1b[2J\t\u200d\n" if terminal else text)


def test_commands_print_through_these_functions() -> None:
    # ``passes`` prints the documentation of our own classes, ``run`` the end of a line.
    for path in COMMANDS.glob("*.py"):
        if path.name in {"common.py", "passes.py"}:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and node.args:
                called = ast.unparse(node.func)
                assert called not in {"click.echo", "click.secho", "print", "Console"}, path
