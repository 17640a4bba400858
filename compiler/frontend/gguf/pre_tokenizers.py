"""How text is cut before the merges of a byte-level BPE apply, by ``tokenizer.ggml.pre``."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from eoracc.compiler.frontend.tokenizer import DIGIT_PATTERN, GPT2_PATTERN

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PRE_TOKENIZERS", "PreTokenization"]


@dataclass(frozen=True, kw_only=True)
class PreTokenization:
    """What a name of a pre-tokenizer stands for.

    Attributes:
      patterns: they split the text, one after the other.
      nfc: whether text is brought into Unicode's composed form first.
      ignore_merges: whether a piece that is a token as a whole is never built from merges.
      add_bos: whether a text begins with the first token where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


# Patterns as their tokenizers publish them.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_QWEN35 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED_CODER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}"
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# The ranges are Chinese characters, and Hangul with what lies between.
_DEEPSEEK_CODER = (
    r"[\r\n]",
    r"\s?\p{L}+",
    r"\s?\p{P}+",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)

_LLAMA3_FAMILY = PreTokenization(patterns=(_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS = PreTokenization(patterns=(DIGIT_PATTERN, GPT2_PATTERN))

PRE_TOKENIZERS: Mapping[str, PreTokenization] = MappingProxyType(
    {
        "dbrx": PreTokenization(patterns=(_LLAMA3,)),
        "deepseek-coder": PreTokenization(patterns=_DEEPSEEK_CODER),
        "deepseek-r1-qwen": PreTokenization(patterns=(_QWEN2,), nfc=True),
        "falcon3": _LLAMA3_FAMILY,
        "gpt-2": PreTokenization(patterns=(GPT2_PATTERN,)),
        "gpt-4o": PreTokenization(patterns=(_GPT4O,)),
        "llama-bpe": _LLAMA3_FAMILY,
        "llama-v3": _LLAMA3_FAMILY,
        "llama3": _LLAMA3_FAMILY,
        "llama4": PreTokenization(patterns=(_GPT4O,)),
        "pixtral": _LLAMA3_FAMILY,
        "qwen2": PreTokenization(patterns=(_QWEN2,), nfc=True),
        "qwen35": PreTokenization(patterns=(_QWEN35,), nfc=True),
        "refact": _DIGITS,
        "seed-coder": PreTokenization(patterns=(_SEED_CODER,)),
        "smaug-bpe": PreTokenization(patterns=(_LLAMA3,)),
        "smollm": _DIGITS,
        "starcoder": _DIGITS,
        "tekken": PreTokenization(patterns=(_TEKKEN,), ignore_merges=True, add_bos=True),
    }
)
"""By name. Those that are missing have no published pattern that could be compared."""
