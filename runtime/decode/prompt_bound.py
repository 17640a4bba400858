"""How many bytes of a text fit into a number of tokens: what surely is too long is not tokenized.

A token holds at most as many bytes as the longest one of the vocabulary. That bounds a text only if
no part of the tokenizer deletes anything. Each part that is known to keep all bytes, or to shrink
them by a known factor, is listed here; for a tokenizer with any other part there is no bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

__all__ = ["SHRINKS", "PromptBound", "byte_letters", "prompt_bound"]

_DECOMPOSED = 3
_COMPATIBLE = 4
_COMPOSED = 3

SHRINKS: Mapping[str, int] = {
    "ByteLevel": 1,
    "Prepend": 1,
    "NFD": _DECOMPOSED,
    "NFKD": _COMPATIBLE,
    # Composition follows decomposition.
    "NFC": _DECOMPOSED * _COMPOSED,
    "NFKC": _COMPATIBLE * _COMPOSED,
    "Lowercase": 3,
}
"""Normalizers, and how many bytes at most become one."""

_KEEPING_PRETOKENIZERS = frozenset(
    {"ByteLevel", "Digits", "FixedLength", "Metaspace", "UnicodeScripts"}
)
_BYTES_OF_CHARACTER = 4
_NOT_IN_UTF8 = bytes([0xC0, 0xC1, *range(0xF5, 0x100)])


@dataclass(frozen=True)
class PromptBound:
    """Bytes that a token can hold.

    Attributes:
      bytes_per_token: of any token.
      vanishing: bytes that have no token, and are left out of a text.
      greedy: added tokens that swallow the blanks around them; a text with one has no bound.
    """

    bytes_per_token: int
    vanishing: bytes = b""
    greedy: tuple[str, ...] = ()

    def excludes(self, text: str, tokens: int) -> bool:
        """Whether ``text`` surely has more than ``tokens`` tokens; False if that is not known."""
        most = tokens * self.bytes_per_token
        if len(text) * _BYTES_OF_CHARACTER <= most:
            return False
        size = len(text.encode(errors="replace").translate(None, self.vanishing))
        return size > most and not any(token in text for token in self.greedy)


def prompt_bound(tokenizer: Mapping[str, Any]) -> PromptBound | None:
    """The bound of a tokenizer; None if it may delete text, or is not known to keep it.

    Args:
      tokenizer: content of tokenizer.json.
    """
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    pretokenizers = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    shrinks = [_shrink(part) for part in normalizers]
    known = [shrink for shrink in shrinks if shrink is not None]
    if len(known) < len(shrinks) or not all(map(_keeps, pretokenizers)):
        return None
    byte_level = any(part["type"] == "ByteLevel" for part in (*normalizers, *pretokenizers))
    model = tokenizer["model"]
    vanishing = b""
    if not _is_plain(model):
        return None
    tokens = _tokens(model)
    if byte_level:
        vanishing = bytes(
            byte for letter, byte in byte_letters().items() if letter not in tokens
        ).translate(None, _NOT_IN_UTF8)
    elif not _knows_every_character(model, tokens):
        return None
    if normalizers and vanishing:
        return None  # which bytes vanish is known of the normalized text alone
    added = tokenizer.get("added_tokens") or []
    greedy = [token for token in added if token["lstrip"] or token["rstrip"]]
    if normalizers and any(token["normalized"] for token in greedy):
        return None  # a text may have one that is not spelled out in it
    lengths = [len(token) if byte_level else len(token.encode()) for token in tokens]
    lengths += [len(token["content"].encode()) for token in added]
    longest = max(*lengths, _BYTES_OF_CHARACTER)
    return PromptBound(
        longest * prod(known), vanishing, tuple(token["content"] for token in greedy)
    )


def _parts(part: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """The parts of a sequence, or the only part."""
    if part is None:
        return []
    if part["type"] != "Sequence":
        return [part]
    return [inner for member in part[members] for inner in _parts(member, members)]


def _shrink(normalizer: Mapping[str, Any]) -> int | None:
    if normalizer["type"] == "Replace":
        pattern, content = normalizer["pattern"].get("String"), normalizer["content"]
        keeps = pattern is not None and len(content.encode()) >= len(pattern.encode())
        return 1 if keeps else None
    return SHRINKS.get(normalizer["type"])


def _keeps(pretokenizer: Mapping[str, Any]) -> bool:
    kind = pretokenizer["type"]
    if kind in {"Punctuation", "Split"}:
        return bool(pretokenizer["behavior"] != "Removed")
    return kind in _KEEPING_PRETOKENIZERS


def _is_plain(model: Mapping[str, Any]) -> bool:
    """Whether tokens are parts of the text, and all of it."""
    return model.get("type") in {"BPE", "Unigram"} and not (
        model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    )


def _tokens(model: Mapping[str, Any]) -> frozenset[str]:
    entries = model["vocab"]
    return frozenset(entries if isinstance(entries, Mapping) else (token for token, _ in entries))


def _knows_every_character(model: Mapping[str, Any], tokens: frozenset[str]) -> bool:
    """Whether no character vanishes, and no run of them becomes one token for the unknown."""
    if model.get("byte_fallback") and all(f"<0x{byte:02X}>" in tokens for byte in range(256)):
        return True
    return model["type"] == "BPE" and bool(model.get("unk_token")) and not model.get("fuse_unk")


@lru_cache(maxsize=1)
def byte_letters() -> Mapping[str, int]:
    """Bytes by the letter that stands for each: itself if printable, otherwise one above 255."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return letters | {chr(256 + index): byte for index, byte in enumerate(others)}
