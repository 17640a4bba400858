from __future__ import annotations

import pytest

from eoracc.printable import escape_controls, printable, quoted


@pytest.mark.parametrize(
    "text",
    [
        "\x1b[31m",
        "a\nerror: b",
        "\r",
        "\x9b2J",
        "\u202edesrever",
        "\u2066",
        "\u200b",
        "\u2028",
        "\ud800",
        "\x00",
        "\x7f",
    ],
    ids=ascii,
)
def test_nothing_reaches_the_terminal_raw(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable()
    assert shown.encode("utf-8")
    # Nothing is lost: the escapes are Python's.
    assert shown.encode("ascii", "backslashreplace").decode("unicode_escape") == text


def test_letters_stay_as_they_are() -> None:
    text = "Größe 大小 [red]x[/red] 'q' \\n"
    assert printable(text) == text


def test_long_text_is_cut_before_it_is_escaped() -> None:
    shown = printable("\x07" * 5_000_000, limit=3)
    assert shown == "\\x07\\x07\\x07… (5,000,000 characters)"


def test_kept_characters_are_kept() -> None:
    assert escape_controls("a\tb\nc\x1b", keep="\t\n") == "a\tb\nc\\x1b"


def test_quoted_values_are_cut() -> None:
    assert quoted("a\n'") == repr("a\n'")
    assert len(quoted(["x"] * 100_000)) < 250
