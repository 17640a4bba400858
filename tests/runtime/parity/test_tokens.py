from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from eoracc.errors import ArtifactError
from eoracc.runtime.decode.codec import Codec
from eoracc.runtime.decode.detokenize import TextStream
from eoracc.runtime.parity.tokens import (
    TOKENS_FILE,
    TokenCase,
    TokenDifference,
    compare_tokens,
    read_token_cases,
    write_token_cases,
)
from tests.tokenizer_zoo import ZOO

if TYPE_CHECKING:
    from pathlib import Path

CASE = TokenCase("a  b", special=True, tokens=[1, 2, 3], decoded="a  b")


@pytest.fixture(scope="module")
def codec(tmp_path_factory: pytest.TempPathFactory) -> Codec:
    return Codec(ZOO["llama2_legacy"](tmp_path_factory.mktemp("tokenizer")))


def test_the_first_difference_is_found(codec: Codec) -> None:
    text = "Hello world"
    right = TokenCase(text, special=True, tokens=codec.encode(text), decoded=text)
    assert compare_tokens(codec, [right, right]) is None
    longer = replace(right, tokens=[*right.tokens, 5])
    assert compare_tokens(codec, [right, longer]) == TokenDifference(longer, codec.encode(text))
    other = replace(right, special=False)
    assert compare_tokens(codec, [other]) == TokenDifference(other, codec.encode(text)[1:])
    decoded = replace(right, decoded="Hello")
    assert compare_tokens(codec, [decoded]) == TokenDifference(decoded, text)


def test_text_as_a_whole_and_piece_by_piece(codec: Codec, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "Hello world"
    case = TokenCase(text, special=True, tokens=codec.encode(text), decoded=text)
    with monkeypatch.context() as patch:
        patch.setattr(codec, "decode", lambda _: "whole")
        assert compare_tokens(codec, [case]) == TokenDifference(case, "whole")
    monkeypatch.setattr(codec, "stream", lambda: TextStream(lambda _: "pieces"))
    assert compare_tokens(codec, [case]) == TokenDifference(case, "pieces")


def test_a_difference_in_words() -> None:
    found = TokenDifference(CASE, [1, 2, 4, 5])
    assert str(found) == "'a  b' has tokens [..., 4, 5] for [..., 3]"
    assert str(TokenDifference(CASE, [1, 2])) == "'a  b' has tokens [..., ] for [..., 3]"
    assert str(TokenDifference(CASE, "a b")) == (
        "the tokens of 'a  b' are decoded as 'a b', not as 'a  b'"
    )
    long = replace(CASE, text="a" * 500)
    assert len(str(TokenDifference(long, list(range(500))))) < 300


def test_a_record_comes_back(tmp_path: Path) -> None:
    assert read_token_cases(tmp_path) == []
    cases = [CASE, replace(CASE, text="\u65e5\u0000", special=False)]
    write_token_cases(tmp_path, cases)
    assert read_token_cases(tmp_path) == cases


@pytest.mark.parametrize(
    "change",
    [
        {"cases": 3},
        {"cases": [3]},
        {"cases": [{"text": "a"}]},
        {"cases": [{"text": "a", "special": True, "tokens": ["x"], "decoded": "a"}]},
        {"schema": 2},
        {"format": "x"},
    ],
)
def test_damaged_records(tmp_path: Path, change: dict[str, Any]) -> None:
    write_token_cases(tmp_path, [CASE])
    path = tmp_path / TOKENS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ArtifactError, match=TOKENS_FILE):
        read_token_cases(tmp_path)
