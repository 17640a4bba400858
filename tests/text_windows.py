"""Windows of a text that a test writes, and their text read back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.compiler.config.sections import TextConfig
from eoracc.compiler.text.windows import Windows, load_windows

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

__all__ = ["prose", "read", "windows"]


def prose(words: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    syllables = ["con", "gress", "the", "union", " ", " ", "\n\n", "ation", "é", "日", "s, ", "12"]
    return "".join(rng.choice(syllables, words))


def windows(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    text: str | bytes,
    **options: Any,  # noqa: ANN401
) -> Windows:
    path = folder / options.pop("name", "text.txt")
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    spec = TextConfig(
        text=path.name,
        **{key: options.pop(key) for key in ("field", "messages", "split") if key in options},
    )
    settings = {"samples": 2, "sequence_length": 8, **options}
    return load_windows(spec, tokenizer, config_dir=folder, **settings)


def read(tokenizer: PreTrainedTokenizerBase, found: Windows) -> list[str]:
    return [
        str(tokenizer.decode(row[mask.astype(bool)]))
        for row, mask in zip(found.input_ids, found.attention_mask, strict=True)
    ]
