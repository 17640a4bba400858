"""Tokens of a text, and the text of tokens, by the tokenizer.json of an artifact.

The library ``tokenizers`` follows all of tokenizer.json, as transformers does. onnxruntime-genai's
tokenizer does not: it drops normalizers, prefix spaces and the flags of added tokens without a
word, and ends a text at a NUL character.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import tokenizers

from eoracc.documents import VOCABULARY_BYTES, Reader
from eoracc.errors import ArtifactError, RequestError
from eoracc.runtime.decode.detokenize import TextStream, clean_up_spaces
from eoracc.runtime.decode.prompt_bound import PromptBound, prompt_bound

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["CONFIG_FILE", "TOKENIZER_FILE", "Codec"]

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
_LONG_TEXT = 2000
"""Characters that take milliseconds to tokenize."""

_READER = Reader(ArtifactError, "build the artifact again", constants=True)
_SEED = 8
"""Tokens of the prompt that the text of an answer continues from."""


class Codec:
    """The tokenizer of a folder, equal to transformers'. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        """Open tokenizer.json, with the settings of tokenizer_config.json.

        Raises:
          ArtifactError: a file is missing or damaged.
        """
        path = self._path = folder / TOKENIZER_FILE
        content = _READER.read_text(path, limit=VOCABULARY_BYTES)
        with _READER.refusing(path, "is no tokenizer"):
            self._tokenizer = tokenizers.Tokenizer.from_str(content)
        # A file may keep the limits of its training; a prompt is neither cut nor padded.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _read_config(folder / CONFIG_FILE)
        self._tokenizer.encode_special_tokens = config.get("split_special_tokens") is True
        self._clean_up = _cleans_up(config, self._tokenizer)
        self._special = frozenset(
            index
            for index, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )

    @cached_property
    def bound(self) -> PromptBound | None:
        """How many bytes a token can hold; None if there is no bound."""
        return prompt_bound(_READER.parse(self.to_json(), TOKENIZER_FILE))

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Tokens of ``text``.

        Args:
          text: any; special tokens spelled out in it become special tokens, unless
            tokenizer_config.json sets ``split_special_tokens``.
          special: add BOS, or whatever the tokenizer adds to a text.

        Raises:
          RequestError: half of a surrogate pair stands alone in ``text``.
          ArtifactError: the tokenizer fails on it.
        """
        try:
            # A tokenizer.json that could be opened may still fail, or even panic, on a text.
            with _READER.refusing(self._path, "cannot encode this text"):
                ids = self._encode(text, special=special)
        except ArtifactError:
            place = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if place is None:
                raise
            raise RequestError(
                f"the text holds U+{ord(text[place]):04X} at character {place}, half of a "
                "surrogate pair: remove it"
            ) from None
        return ids

    def _encode(self, text: str, *, special: bool) -> list[int]:
        if len(text) < _LONG_TEXT:
            encoding = self._tokenizer.encode(text, add_special_tokens=special)
        else:
            # Other threads run meanwhile: unlike 'encode', it releases the interpreter's lock.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids: list[int] = encoding.ids
        return ids

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special ones left out.

        Raises:
          ArtifactError: the tokenizer fails on them.
        """
        text = self._decode(tokens)
        return clean_up_spaces(text) if self._clean_up else text

    def to_json(self) -> str:
        """The content of tokenizer.json, from memory."""
        content: str = self._tokenizer.to_str()
        return content

    def stream(self, prompt: Sequence[int] = ()) -> TextStream:
        """A decoder of one text, token by token.

        Args:
          prompt: tokens that the text continues. Its first word keeps its blank unless a special
            token, such as the end of a turn, stands before it.
        """
        before: list[int] = []
        for token in reversed(prompt[-_SEED:]):
            if token in self._special:
                break
            before.insert(0, int(token))
        return TextStream(
            self._decode, skipped=self._special, before=before, clean_up=self._clean_up
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        with _READER.refusing(self._path, "cannot decode these tokens"):
            text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none."""
    return _READER.read_object(path) if path.exists() else {}


def _cleans_up(config: dict[str, Any], tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether transformers takes blanks before punctuation out of decoded text."""
    if not config.get("clean_up_tokenization_spaces", False):
        return False
    # Old files say so for tokenizers of every kind; BPE has its blanks in its tokens.
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(tokenizer.model).__name__ != "BPE" or bool(config.get(forced, False))
