"""Tokenize the beginning of a text without reading the rest of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

__all__ = ["CHARACTERS_PER_TOKEN", "MARGIN", "bos_tokens", "first_tokens"]

CHARACTERS_PER_TOKEN = 6
"""First guess at the characters needed for one token; doubled until the text is long enough."""

MARGIN = 64
"""Last tokens of a cut text, discarded: the text after the cut could have changed them.

Tokenizers decide within a word, or a run of blanks, and its neighbours, never far ahead.
"""


def bos_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer puts before a text: ``[bos]`` or none."""
    bos = tokenizer.bos_token_id
    first = list(tokenizer("a")["input_ids"])[:1]
    return [int(bos)] if bos is not None and first == [bos] else []


def first_tokens(
    pieces: Iterator[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> list[int]:
    """At least the first ``wanted`` tokens of the joined pieces, or all of them for None.

    The result is the same as tokenizing all pieces and cutting, but only the beginning is read and
    tokenized.

    Args:
      pieces: of the text.
      tokenizer: the model's.
      wanted: number of tokens; fewer are returned where the text has fewer.
    """
    text, ended = "", False
    target = None if wanted is None else max(wanted + MARGIN, 1) * CHARACTERS_PER_TOKEN
    parts: list[str] = []
    size = 0
    while True:
        while not ended and (target is None or size <= target):
            piece = next(pieces, None)
            if piece is None:
                ended = True
            else:
                parts.append(piece)
                size += len(piece)
        text = "".join(parts)
        whole = ended and (target is None or size <= target)
        tokens = _encode(tokenizer, text if whole else text[:target])
        if whole:
            return tokens
        if wanted is not None and len(tokens) - MARGIN >= wanted:
            return tokens[:-MARGIN]
        assert target is not None  # noqa: S101 - everything is read at once for None
        target *= 2


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if not text:
        return []
    # verbose=False: a text may be longer than the model's context here.
    encoded = tokenizer(text, add_special_tokens=False, verbose=False)
    return [int(token) for token in encoded["input_ids"]]
