"""What is written gives transformers' tokens and text, for every kind of tokenizer."""

from __future__ import annotations

import io
import json
from typing import TYPE_CHECKING, Any

import pytest
import sentencepiece
from tokenizers import Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Whitespace

from eoracc.compiler.frontend.tokenizer import tokenizer_advice, write_tokenizer
from eoracc.errors import ModelError
from eoracc.runtime.decode.codec import Codec
from tests.tokenizer_zoo import STRINGS, ZOO, write_files

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
WORDS = "the cat sat on a mat and then it ran over three hills in 1999"


def opened(folder: Path) -> Any:  # noqa: ANN401 - transformers has no types for it
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("member", ZOO)
def test_tokens_and_text_are_those_of_transformers(tmp_path: Path, member: str) -> None:
    tokenizer = opened(ZOO[member](tmp_path / "model"))
    write_tokenizer(tokenizer, tmp_path / "model", tmp_path / "out")
    codec = Codec(tmp_path / "out")
    for text in STRINGS:
        for special in (True, False):
            tokens = tokenizer(text, add_special_tokens=special)["input_ids"]
            assert codec.encode(text, special=special) == tokens, text
        decoded = tokenizer.decode(tokens, skip_special_tokens=True) if tokens else ""
        assert codec.decode(tokens) == decoded
        stream = codec.stream()
        assert "".join(stream.decode(token) for token in tokens) + stream.flush() == decoded


def changed(folder: Path, pre_tokenizer: PreTokenizer | None) -> PreTokenizer | None:
    tokenizer = Tokenizer(models.BPE(vocab={"<unk>": 0, "<s>": 1, "</s>": 2}, merges=[]))
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    source = write_files(folder / "model", tokenizer)
    written = write_tokenizer(opened(source), source, folder / "out")
    step: PreTokenizer | None = Tokenizer.from_file(str(written[0])).pre_tokenizer
    return step


@pytest.mark.parametrize("individual", [True, False])
def test_digits_are_cut_as_before(tmp_path: Path, *, individual: bool) -> None:
    original = Sequence([Digits(individual), ByteLevel(add_prefix_space=False)])
    rewritten = changed(tmp_path, original)
    assert rewritten is not None
    assert "Digits" not in (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8")
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
def test_others_are_written_as_they_are(tmp_path: Path, pre_tokenizer: PreTokenizer | None) -> None:
    assert str(changed(tmp_path, pre_tokenizer)) == str(pre_tokenizer)


def test_a_model_without_merges_gets_none(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "the": 3, "sky": 4}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    source = write_files(tmp_path / "model", tokenizer)
    (path, _) = write_tokenizer(opened(source), source, tmp_path / "out")
    assert "merges" not in json.loads(path.read_text(encoding="utf-8"))["model"]
    assert Tokenizer.from_file(str(path)).encode("the sky", add_special_tokens=False).ids == [3, 4]


@pytest.mark.parametrize("space", [False, True])
def test_file_is_as_short_as_the_format_allows(tmp_path: Path, *, space: bool) -> None:
    """Merges of tokens with a space have only the longer of two forms."""
    pairs = [("a", "b"), ("ab", "ü")] + ([("a", " ")] if space else [])
    tokens = ["<unk>", "<s>", "</s>", "a", "b", "ü", " ", *("".join(pair) for pair in pairs)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    source = write_files(
        tmp_path / "model", Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token="<unk>"))
    )
    (path, _) = write_tokenizer(opened(source), source, tmp_path / "out")
    text = path.read_text(encoding="utf-8")
    content = json.loads(text)
    expected = [list(pair) if space else " ".join(pair) for pair in pairs]
    assert content["model"]["merges"] == expected
    assert text == json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    written = Tokenizer.from_file(str(path))
    assert written.encode("aba abü").ids == opened(source)("aba abü")["input_ids"]


def test_limits_of_training_are_left_out(tmp_path: Path) -> None:
    source = ZOO["llama3"](tmp_path / "model")
    content = json.loads((source / "tokenizer.json").read_text())
    content["truncation"] = {
        "direction": "Right",
        "max_length": 4,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    (source / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = opened(source)
    write_tokenizer(tokenizer, source, tmp_path / "out")
    text = "one two three four five six"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) > 4
    assert Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json")).encode(text).ids == tokens
    # A file that was not written here may have them.
    assert Codec(source).encode(text) == tokens


def test_config_is_that_of_the_checkpoint_or_the_least(tmp_path: Path) -> None:
    source = ZOO["gpt2"](tmp_path / "model")
    _, path = write_tokenizer(opened(source), source, tmp_path / "out")
    assert path.read_text() == (source / "tokenizer_config.json").read_text()
    source = ZOO["no_tokenizer_config"](tmp_path / "bare")
    _, path = write_tokenizer(opened(source), source, tmp_path / "out")
    assert json.loads(path.read_text()) == {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_tokenizer_model_alone(tmp_path: Path) -> None:
    """A checkpoint with SentencePiece's own file: its tokens are those of SentencePiece."""
    model = io.BytesIO()
    words = WORDS.split()
    lines = [" ".join(words[i % 7 :] + words[: i % 5]) for i in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=320,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        num_threads=1,
        minloglevel=2,
    )
    source = tmp_path / "model"
    source.mkdir()
    (source / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer = opened(source)
    write_tokenizer(tokenizer, source, tmp_path / "out")
    codec = Codec(tmp_path / "out")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    for text in ("the cat", "then three hills ran", "in 1999", "日本 é", "mat\tx"):
        tokens = codec.encode(text, special=False)
        assert tokens == processor.encode(text) == tokenizer.encode(text, add_special_tokens=False)
        assert codec.decode(tokens) == text


def test_python_code_is_refused(tmp_path: Path) -> None:
    from transformers import ByT5Tokenizer

    factory: Any = ByT5Tokenizer
    with pytest.raises(ModelError, match="its tokenizer ByT5Tokenizer runs as Python code"):
        write_tokenizer(factory(), tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_package_that_reads_tiktoken_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed = ["tiktoken"]
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: name if name in installed else None
    )
    least = "add tokenizer.json and tokenizer_config.json"
    assert tokenizer_advice(tmp_path) == least
    (tmp_path / "vocabulary.tiktoken").touch()
    assert tokenizer_advice(tmp_path) == least
    installed.clear()
    advice = "install tiktoken, which reads vocabulary.tiktoken, or add tokenizer.json"
    assert tokenizer_advice(tmp_path) == advice
    (tmp_path / "tokenizer.json").touch()
    assert tokenizer_advice(tmp_path) == least
