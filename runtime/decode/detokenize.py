"""The text of tokens that come one by one, in whole characters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

__all__ = ["TextStream", "clean_up_spaces"]

_INCOMPLETE = "\ufffd"
"""What a decoder gives for bytes that are no character, or not yet."""

_LONGEST = 3
"""Bytes that the beginning of a character has at most: it has four."""

_WINDOW = 8
"""Tokens that are decoded together, unless a character is incomplete."""

_STUCK = 64
"""Tokens after which bytes that become no character are shown as such."""

_SPACES = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}
"""Replaced one after the other, in this order."""

_ENDING = re.compile(r" [ ']*[nmstver']{0,3}$")
"""The end of a text that more text may make one of :data:`_SPACES`."""


def clean_up_spaces(text: str) -> str:
    """``text`` without the blanks that transformers takes out before punctuation.

    >>> clean_up_spaces("do n't stop , please .")
    "don't stop, please."
    """
    for spaced, clean in _SPACES.items():
        text = text.replace(spaced, clean)
    return text


class TextStream:
    """Decodes one text token by token.

    All pieces together, and what :meth:`flush` returns, are the text of all tokens at once. They
    continue the text of the tokens before them: a decoder may take the blank off the first word
    of a text, so that each token is decoded together with a few tokens before it.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        skipped: Collection[int] = (),
        before: Sequence[int] = (),
        clean_up: bool = False,
    ) -> None:
        """Begin a text.

        Args:
          decode: the text of tokens.
          skipped: tokens that have no text, as ``decode`` has it.
          before: tokens that the text continues, none of them skipped.
          clean_up: take blanks before punctuation out, see :func:`clean_up_spaces`.
        """
        self._decode = decode
        self._skipped = skipped
        self._clean_up = clean_up
        self._window = list(before)
        text = decode(self._window) if before else ""
        self._shown = len(text) - _undecided(text)
        self._whole = len(self._window)
        self._held = ""

    def decode(self, token: int) -> str:
        """The text that ``token`` adds; empty while a character is incomplete."""
        if token in self._skipped:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        left = _undecided(text)
        stuck = len(self._window) > _STUCK
        if stuck:
            left = min(left, _LONGEST)
        new = text[self._shown : len(text) - left]
        self._shown = max(self._shown, len(text) - left)
        if not left:
            # Bytes of one character are never cut apart: a decoder may take them as a whole.
            if len(self._window) > _WINDOW:
                self._cut(self._whole, left)
            self._whole = len(self._window)
        elif stuck:
            self._cut(len(self._window) - _WINDOW, left)
            self._whole = 0
        return self._cleaned(new)

    def flush(self) -> str:
        """The rest of the text, at its end; bytes that are no character become U+FFFD."""
        rest = self._decode(self._window)[self._shown :] if self._window else ""
        self._shown += len(rest)
        held, self._held = self._held + rest, ""
        return clean_up_spaces(held) if self._clean_up else held

    def _cut(self, start: int, left: int) -> None:
        """Forget the tokens before ``start``; the last ``left`` characters are not shown yet."""
        self._window = self._window[start:]
        self._shown = max(len(self._decode(self._window)) - left, 0)

    def _cleaned(self, text: str) -> str:
        if not self._clean_up:
            return text
        text = self._held + text
        ending = _ENDING.search(text)
        end = len(text) if ending is None else ending.start()
        self._held = text[end:]
        return clean_up_spaces(text[:end])


def _undecided(text: str) -> int:
    """Characters at the end of ``text`` that more bytes may change.

    Where bytes are tokens, one byte too few or too many makes U+FFFD of each byte beside it.
    """
    return len(text) - len(text.rstrip(_INCOMPLETE))
