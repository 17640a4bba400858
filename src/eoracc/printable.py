"""Text of unknown origin for a terminal: no control characters, one line, a bounded length.

Names and values come from checkpoints, artifacts, adapters and model.yaml. Raw, they could move
the cursor, recolour the terminal, forge a line of output, or reverse the order of its letters.
"""

from __future__ import annotations

import re

__all__ = ["escape_commands", "escape_controls", "printable", "quoted"]

_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Controls except tab and line feed, bidirectional ones, and half surrogate pairs."""

VALUE_CHARS = 200
"""Characters of a value or name in a sentence; longer ones are cut."""


def printable(text: object, limit: int = VALUE_CHARS) -> str:
    r"""``text`` on one line, without control characters, cut after ``limit`` characters.

    Control characters, line breaks, bidirectional controls, zero-width characters and half
    surrogate pairs appear as Python escapes.

    >>> printable("a\x1b[31mb\nc\u202ed")
    'a\\x1b[31mb\\nc\\u202ed'
    >>> printable("abcdef", limit=3)
    'abc… (6 characters)'
    """
    whole = str(text)
    shown = escape_controls(whole[:limit])
    return shown if len(whole) <= limit else f"{shown}… ({len(whole):,} characters)"


def quoted(value: object, limit: int = VALUE_CHARS) -> str:
    """A value as Python spells it, a text in quotation marks, cut after ``limit`` characters.

    >>> quoted("a b"), quoted(None), quoted("abcdef", limit=4)
    ("'a b'", 'None', "'abc… (8 characters)")
    """
    return printable(repr(value), limit)


def escape_controls(text: str, keep: str = "") -> str:
    r"""``text`` with every character that does not print as an escape, except those of ``keep``.

    >>> escape_controls("a\tb\x07", keep="\t")
    'a\tb\\x07'
    """
    if text.isprintable():
        return text
    return "".join(
        character
        if character.isprintable() or character in keep
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def escape_commands(text: str) -> str:
    r"""``text`` of several lines, with what could act on a terminal as escapes.

    Unlike :func:`escape_controls` it keeps the joiners that emoji and many scripts need.

    >>> escape_commands("a\x1b[2J\n\u200db")
    'a\\x1b[2J\n\u200db'
    """
    return _COMMANDS.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)
