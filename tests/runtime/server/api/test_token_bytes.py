from __future__ import annotations

import json
from pathlib import Path

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.server.api.token_bytes import token_bytes
from tests.tiny_artifact import write_byte_tokenizer

PATH = Path("tokenizer.json")


def test_byte_level_tokens_are_the_bytes_of_the_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    write_byte_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / PATH))
    found = token_bytes(tokenizer.to_str(), PATH)
    text = "".join(map(chr, range(0x250))) + "日本 😀"
    assert b"".join(found[token] for token in tokenizer.encode(text).ids) == text.encode()
    assert sorted(map(len, found.values()))[:256] == [1] * 256
    assert found[1] == b"<s>"


def test_sentencepiece_tokens() -> None:
    vocabulary = {"\u2581the": 5, "<0xE2>": 6, "é": 7, "<0x>": 8}
    content = {
        "model": {"vocab": vocabulary},
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]},
        "added_tokens": [{"id": 9, "content": "<end>"}],
    }
    assert token_bytes(json.dumps(content), PATH) == {
        5: b" the",
        6: b"\xe2",
        7: "é".encode(),
        8: b"<0x>",
        9: b"<end>",
    }


def test_unigram_vocabularies_are_lists() -> None:
    content = {"model": {"vocab": [["<unk>", 0.0], ["\u2581a", -1.5]]}, "decoder": None}
    assert token_bytes(json.dumps(content), PATH) == {0: b"<unk>", 1: b" a"}


@pytest.mark.parametrize("content", [{}, {"model": {"vocab": 3}}, {"model": {"vocab": [1]}}])
def test_what_holds_no_vocabulary(content: object) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: holds no vocabulary"):
        token_bytes(json.dumps(content), PATH)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_no_json(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: .*: build the artifact again"):
        token_bytes(text, PATH)
