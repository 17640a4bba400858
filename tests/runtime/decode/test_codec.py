from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from eoracc.errors import ArtifactError, RequestError
from eoracc.runtime.decode.codec import Codec
from tests.tokenizer_zoo import ZOO

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return ZOO["llama2_legacy"](tmp_path / "tokenizer")


def test_an_answer_continues_its_prompt(folder: Path) -> None:
    codec = Codec(folder)
    prompt = codec.encode("The capital of France is")
    answer = codec.encode("The capital of France is Paris, well", special=False)[len(prompt) - 1 :]
    stream = codec.stream(prompt)
    assert "".join(map(stream.decode, answer)) == " Paris, well"
    # After a special token a text begins anew, as all of its tokens at once are read.
    for before in ([], [*prompt, 2]):
        stream = codec.stream(before)
        text = "".join(map(stream.decode, answer)) + stream.flush()
        assert text == codec.decode(answer) == "Paris, well"


def test_bos_only_where_it_is_asked_for(folder: Path) -> None:
    codec = Codec(folder)
    assert codec.encode("a") == [1, *codec.encode("a", special=False)]
    assert codec.encode("") == [1]
    assert codec.encode("", special=False) == []
    assert codec.decode([]) == codec.stream().flush() == ""


def test_half_a_surrogate_pair_is_named(folder: Path) -> None:
    with pytest.raises(RequestError, match=r"holds U\+D83D at character 2, half of a surrogate"):
        Codec(folder).encode("a \ud83d")


class PanicException(BaseException):
    """As the Rust libraries raise it: not an ``Exception``."""


def test_a_tokenizer_that_fails_names_its_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise PanicException("no entry")

    codec = Codec(folder)
    monkeypatch.setattr(codec, "_tokenizer", SimpleNamespace(encode=fail, decode=fail))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: cannot encode this text \(no entry"):
        codec.encode("a")
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: cannot decode these tokens \(no en"):
        codec.decode([1])


def test_damaged_files(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    for text, problem in (("{", "is not valid JSON"), ("[]", "is a list where")):
        config.write_text(text)
        with pytest.raises(ArtifactError, match=rf"tokenizer_config\.json: {problem}"):
            Codec(folder)
    config.unlink()
    Codec(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": None}))
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: is no tokenizer \("):
        Codec(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"tokenizer\.json: is missing: build the artifact"):
        Codec(folder)
