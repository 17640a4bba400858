"""The bytes of each token, which may be part of a character.

They come from tokenizer.json. Vocabularies encode bytes in two ways: as printable characters
(byte-level BPE), or as plain text with ``▁`` for a blank and ``<0xE2>`` for a single byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eoracc.documents import Reader
from eoracc.errors import ArtifactError
from eoracc.runtime.decode.prompt_bound import byte_letters

__all__ = ["token_bytes"]

_READER = Reader(ArtifactError, "build the artifact again")
_LONE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: str, path: Path) -> Mapping[int, bytes]:
    """The bytes of every token, by its id.

    Args:
      tokenizer: content of tokenizer.json.
      path: of the file, for errors.

    Raises:
      ArtifactError: it is damaged.
    """
    content = _READER.as_object(_READER.parse(tokenizer, path), path)
    with _READER.refusing_form(path, "holds no vocabulary"):
        decode = _byte_level if _is_byte_level(content) else _sentencepiece
        found = {index: decode(token) for token, index in _vocabulary(content["model"]["vocab"])}
        for token in content.get("added_tokens", ()):
            found[token["id"]] = token["content"].encode()
    return found


def _vocabulary(vocabulary: Any) -> Iterator[tuple[str, int]]:  # noqa: ANN401 - JSON
    """Tokens with their ids, from a mapping (BPE) or a list of tokens with scores (Unigram)."""
    if isinstance(vocabulary, Mapping):
        yield from vocabulary.items()
    else:
        for index, (token, _) in enumerate(vocabulary):
            yield token, index


def _is_byte_level(content: Mapping[str, Any]) -> bool:
    decoder = content.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    return any(part.get("type") == "ByteLevel" for part in parts)


def _byte_level(token: str) -> bytes:
    letters = byte_letters()
    if all(letter in letters for letter in token):
        return bytes(letters[letter] for letter in token)
    return token.encode()


def _sentencepiece(token: str) -> bytes:
    if match := _LONE_BYTE.fullmatch(token):
        return bytes.fromhex(match[1])
    return token.replace("\u2581", " ").encode()
