"""The record of the tokens that the build's tokenizer gave, and the check of an artifact's own."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from eoracc.errors import ArtifactError
from eoracc.printable import quoted
from eoracc.runtime.artifact.versioned_json import read_versioned

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from eoracc.runtime.decode.codec import Codec

__all__ = [
    "TOKENS_FILE",
    "TokenCase",
    "TokenDifference",
    "compare_tokens",
    "read_token_cases",
    "write_token_cases",
]

TOKENS_FILE = "tokens.json"
_FORMAT = "eoracc tokens"
_SCHEMA = 1
_LONG = 200


@dataclass(frozen=True)
class TokenCase:
    """What a tokenizer gives for one text.

    Attributes:
      text: to tokenize.
      special: whether BOS, or whatever the tokenizer adds to a text, is added.
      tokens: of the text.
      decoded: the text of the tokens, special ones left out.
    """

    text: str
    special: bool
    tokens: Sequence[int]
    decoded: str


@dataclass(frozen=True)
class TokenDifference:
    """A case that a tokenizer does not follow.

    Attributes:
      case: with the expected values.
      found: tokens, or the text of the expected tokens where that is what differs.
    """

    case: TokenCase
    found: Sequence[int] | str

    @override
    def __str__(self) -> str:
        """Both values, without what they have in common."""
        case, found = self.case, self.found
        text = repr(case.text if len(case.text) <= _LONG else f"{case.text[:_LONG]}...")
        if isinstance(found, str):
            return (
                f"the tokens of {text} are decoded as {quoted(found)}, not as "
                f"{quoted(case.decoded)}"
            )
        start = next(
            (
                index
                for index, (token, other) in enumerate(zip(case.tokens, found, strict=False))
                if token != other
            ),
            min(len(case.tokens), len(found)),
        )
        expected = _short(case.tokens, start)
        return f"{text} has tokens {_short(found, start)} for {expected}"


def compare_tokens(codec: Codec, cases: Iterable[TokenCase]) -> TokenDifference | None:
    """The first case that ``codec`` does not follow; None if there is none.

    Text is compared as a whole and as it comes token by token.
    """
    for case in cases:
        found = codec.encode(case.text, special=case.special)
        if found != list(case.tokens):
            return TokenDifference(case, found)
        if (text := codec.decode(case.tokens)) != case.decoded:
            return TokenDifference(case, text)
        stream = codec.stream()
        text = "".join(stream.decode(token) for token in case.tokens) + stream.flush()
        if text != case.decoded:
            return TokenDifference(case, text)
    return None


def write_token_cases(folder: Path, cases: Iterable[TokenCase]) -> None:
    """Write a record into ``folder``."""
    content = {"format": _FORMAT, "schema": _SCHEMA, "cases": [asdict(case) for case in cases]}
    text = json.dumps(content, ensure_ascii=False) + "\n"
    (folder / TOKENS_FILE).write_text(text, encoding="utf-8")


def read_token_cases(folder: Path) -> list[TokenCase]:
    """The record in ``folder``; empty for an artifact of an eoracc that wrote none.

    Raises:
      ArtifactError: the record is damaged.
    """
    path = folder / TOKENS_FILE
    if not path.is_file():
        return []
    content = read_versioned(
        path,
        file_format=_FORMAT,
        schema=_SCHEMA,
        missing=f"{path}: is missing: build the artifact again",
        foreign="is no record of tokens",
    )
    try:
        return [
            TokenCase(
                text=str(case["text"]),
                special=bool(case["special"]),
                tokens=[int(token) for token in case["tokens"]],
                decoded=str(case["decoded"]),
            )
            for case in content["cases"]
        ]
    except (KeyError, TypeError, ValueError):
        raise ArtifactError(f"{path}: lacks a part: build the artifact again") from None


def _short(tokens: Sequence[int], start: int) -> str:
    shown = ", ".join(str(token) for token in tokens[start : start + 6])
    before = "..., " if start else ""
    after = ", ..." if len(tokens) > start + 6 else ""
    return f"[{before}{shown}{after}]"
