from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Whitespace

from eoracc.compiler.frontend.tokenizer import portable_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXTS = (
    "In 1815 the 18th Congress met.\n\n1. First:  2  items\n\t 3",
    "half ½ and x² in Roman Ⅷ and Arabic ٣٤, 一二三",
    "don't DON'T we'll 's  \n\n  end   ",
    "a1b2c3 12345\r\n\r\n6 \u00a07",
    "   ",
    "",
)


def written(pre_tokenizer: PreTokenizer | None, folder: Path) -> Path:
    tokenizer = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize("individual", [True, False])
def test_digits_are_cut_as_before(tmp_path: Path, *, individual: bool) -> None:
    original = Sequence([Digits(individual), ByteLevel(add_prefix_space=False)])
    path = written(original, tmp_path)
    portable = portable_tokenizer(path, tmp_path / "work")
    assert portable == tmp_path / "work" / "tokenizer" / "tokenizer.json"
    assert "Digits" not in portable.read_text(encoding="utf-8")
    rewritten = Tokenizer.from_file(str(portable)).pre_tokenizer
    assert rewritten is not None
    for text in TEXTS:
        assert rewritten.pre_tokenize_str(text) == original.pre_tokenize_str(text)


@pytest.mark.parametrize(
    "pre_tokenizer",
    [
        None,
        ByteLevel(),
        Sequence([Whitespace(), ByteLevel()]),
        Sequence([Digits(), ByteLevel(add_prefix_space=True)]),
    ],
)
def test_others_are_shipped_as_they_are(tmp_path: Path, pre_tokenizer: PreTokenizer | None) -> None:
    path = written(pre_tokenizer, tmp_path)
    assert portable_tokenizer(path, tmp_path / "work") == path
    assert not (tmp_path / "work").exists()
