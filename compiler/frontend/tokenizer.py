"""The tokenizer that an artifact ships: transformers' own, written as tokenizer.json.

transformers may build a tokenizer from vocab.json and merges.txt or from tokenizer.model, and where
there is a tokenizer.json it may add tokens to it or replace its steps. What is written is the
tokenizer that it ends up with, which is the one that calibration and evaluation use.

Pre-tokenizers are put in the form that tokenizers and onnxruntime-genai both support: genai knows
``Split`` and takes everything else for GPT-2's pattern on the whole text. ``Digits`` before
``ByteLevel``, which SmolLM and StarCoder use, then cuts white space before a digit differently and
with it the token ids. Two Splits say the same and both libraries follow them.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from typing import TYPE_CHECKING, Any

from eoracc.compiler.frontend.documents import CHECKPOINT
from eoracc.errors import ModelError, reason
from eoracc.runtime.decode.codec import CONFIG_FILE, TOKENIZER_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

__all__ = ["DIGIT_PATTERN", "GPT2_PATTERN", "tokenizer_advice", "write_tokenizer"]

DIGIT_PATTERN = r"\p{N}"
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pattern by which ``ByteLevel`` with ``use_regex`` splits."""


def tokenizer_advice(folder: Path) -> str:
    """What to do where transformers cannot read a checkpoint's tokenizer, after a colon."""
    names = sorted(path.name for path in folder.glob("*.tiktoken"))
    is_needed = names and not (folder / TOKENIZER_FILE).is_file()
    if is_needed and importlib.util.find_spec("tiktoken") is None:
        return f"install tiktoken, which reads {names[0]}, or add {TOKENIZER_FILE}"
    return f"add {TOKENIZER_FILE} and {CONFIG_FILE}"


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, source: Path, folder: Path) -> list[Path]:
    """Write ``tokenizer`` as tokenizer.json and tokenizer_config.json.

    Args:
      tokenizer: the checkpoint's.
      source: the checkpoint.
      folder: where to write; created.

    Returns:
      The paths of both.

    Raises:
      ModelError: the tokenizer is Python code, which no file can hold.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    try:
        if backend is None:
            raise TypeError("it is no tokenizer of the library tokenizers")
        content = CHECKPOINT.parse(backend.to_str(), source)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ModelError(
            f"{source}: its tokenizer {type(tokenizer).__name__} runs as Python "
            f"code and cannot be shipped ({reason(error)}): add a {TOKENIZER_FILE} of the library "
            "tokenizers"
        ) from error
    # Limits of training; they would cut and pad what users of the file tokenize.
    content["truncation"] = content["padding"] = None
    content["pre_tokenizer"] = _portable(content["pre_tokenizer"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKENIZER_FILE
    content["model"] = _compact(content["model"])
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text, encoding="utf-8")
    if (source / CONFIG_FILE).is_file():
        shutil.copyfile(source / CONFIG_FILE, folder / CONFIG_FILE)
    else:
        # onnxruntime-genai opens no tokenizer without it.
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / CONFIG_FILE).write_text(json.dumps(config), encoding="utf-8")
    return [path, folder / CONFIG_FILE]


def _compact(model: dict[str, Any]) -> dict[str, Any]:
    """The same model with merges in the shorter of their two forms, ``"a b"`` for ``["a", "b"]``.

    A token with a space in it has only the longer one.
    """
    merges = model.get("merges")
    if not merges or any(isinstance(merge, str) or " " in "".join(merge) for merge in merges):
        return model
    return {**model, "merges": [" ".join(merge) for merge in merges]}


def _portable(pre_tokenizer: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same pre-tokenizer in Splits.

    Left alone is what has no ``Digits``, and what gives every piece a space of its own before it
    is cut further, which no Split can say.
    """
    steps = (pre_tokenizer or {}).get("pretokenizers", [])
    spaced = any(step.get("add_prefix_space", False) for step in steps)
    if pre_tokenizer is None or spaced or not any(step["type"] == "Digits" for step in steps):
        return pre_tokenizer
    portable = [portable for step in steps for portable in _portable_steps(step)]
    return {**pre_tokenizer, "pretokenizers": portable}


def _portable_steps(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] == "Digits":
        return [_split(DIGIT_PATTERN if step["individual_digits"] else f"{DIGIT_PATTERN}+")]
    if step["type"] == "ByteLevel" and step.get("use_regex", True):
        return [_split(GPT2_PATTERN), {**step, "use_regex": False}]
    return [step]


def _split(pattern: str) -> dict[str, Any]:
    regex = {"Regex": pattern}
    return {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False}
