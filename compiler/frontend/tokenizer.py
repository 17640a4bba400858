"""Pre-tokenizers in the form that tokenizers and onnxruntime-genai both support.

genai knows ``Split`` and takes everything else for GPT-2's pattern on the whole text. ``Digits``
before ``ByteLevel``, which SmolLM and StarCoder use, then cuts white space before a digit
differently and with it the token ids. Two Splits say the same and both libraries follow them.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["DIGIT_PATTERN", "GPT2_PATTERN", "portable_tokenizer"]

DIGIT_PATTERN = r"\p{N}"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern by which ``ByteLevel`` with ``use_regex`` splits."""


def portable_tokenizer(path: Path, work: Path) -> Path:
    """A tokenizer.json that genai reads as tokenizers does.

    Args:
      path: the checkpoint's tokenizer.json.
      work: where a changed one is written, as ``work/tokenizer/tokenizer.json``.

    Returns:
      ``path`` itself where nothing needs to change, or where every piece gets a space of its own
      before it is cut further, which no Split can say.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    steps = (content.get("pre_tokenizer") or {}).get("pretokenizers", [])
    spaced = any(step.get("add_prefix_space", False) for step in steps)
    if spaced or not any(step["type"] == "Digits" for step in steps):
        return path
    content["pre_tokenizer"]["pretokenizers"] = [
        portable for step in steps for portable in _portable_steps(step)
    ]
    written = work / "tokenizer" / path.name
    written.parent.mkdir(parents=True, exist_ok=True)
    written.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return written


def _portable_steps(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] == "Digits":
        return [_split(DIGIT_PATTERN if step["individual_digits"] else f"{DIGIT_PATTERN}+")]
    if step["type"] == "ByteLevel" and step.get("use_regex", True):
        return [_split(GPT2_PATTERN), {**step, "use_regex": False}]
    return [step]


def _split(pattern: str) -> dict[str, Any]:
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
