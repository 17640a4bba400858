from __future__ import annotations

import json
import unicodedata
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from eoracc.errors import PromptTooLongError
from eoracc.runtime.decode.codec import Codec
from eoracc.runtime.decode.prompt_bound import SHRINKS, PromptBound, byte_letters, prompt_bound
from tests.tokenizer_zoo import STRINGS, ZOO

if TYPE_CHECKING:
    from pathlib import Path

UNBOUNDED = {"unigram_first", "unigram_nfkc_clean_up"}
"""Members of the zoo that make one token of a run of unknown characters."""

PARTS = [
    *STRINGS,
    " " * 50,
    "\t" * 9,
    "\u1fef" * 7,
    "\U000107a5" * 5,
    "\u0390" * 3,
    "\u212a" * 8,
]


def texts(count: int) -> list[str]:
    """Long texts of odd parts."""
    rng = np.random.default_rng(0)
    return [
        "".join(PARTS[part] for part in rng.integers(len(PARTS), size=12)) for _ in range(count)
    ]


@pytest.mark.parametrize("name", sorted(ZOO.keys() - {"vocab_and_merges"}))
def test_no_text_has_fewer_tokens_than_its_bytes_need(name: str, tmp_path: Path) -> None:
    codec = Codec(ZOO[name](tmp_path / "tokenizer"))
    bound = codec.bound
    assert (bound is None) == (name in UNBOUNDED)
    if bound is None:
        return
    bounded = 0
    for text in [*texts(20), *(part * 40 for part in PARTS)]:
        tokens = len(codec.encode(text, special=False))
        assert not bound.excludes(text, tokens)
        bounded += bound.excludes(text, 1)
    assert bounded > 10  # the bound says something


def test_the_factors_of_normalizers_are_those_of_unicode() -> None:
    codes = (*range(0xD800), *range(0xE000, 0x20000), *range(0x2F800, 0x2FA20))
    letters = [chr(code) for code in codes]  # all that any form changes

    def most(before: list[str], after: list[str]) -> float:
        return max(len(a.encode()) / len(b.encode()) for a, b in zip(before, after, strict=True))

    canonical = [unicodedata.normalize("NFD", letter) for letter in letters]
    composed = most(canonical, letters)
    for form in ("NFD", "NFKD"):
        decomposed = most(letters, [unicodedata.normalize(form, letter) for letter in letters])
        assert decomposed == SHRINKS[form]
        assert decomposed * composed == SHRINKS[form.replace("D", "C")]
    assert most(letters, [letter.lower() for letter in letters]) == SHRINKS["Lowercase"]


BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
MODEL = {"type": "BPE", "byte_fallback": True, "vocab": {**BYTES, "\u2581word": 256}}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
FILE = {"version": "1.0", "truncation": None, "padding": None}
BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def tokenizer_of(**parts: Any) -> dict[str, Any]:  # noqa: ANN401 - as in JSON
    added = {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False}
    content = {"normalizer": BLANKS, "pre_tokenizer": None, "model": MODEL, "added_tokens": [added]}
    return {**content, **parts}


def test_a_token_holds_as_many_bytes_as_the_longest() -> None:
    assert prompt_bound(tokenizer_of()) == PromptBound(len("\u2581word".encode()))
    both = {"type": "Sequence", "normalizers": [{"type": "NFC"}, BLANKS]}
    assert prompt_bound(tokenizer_of(normalizer=both)) == PromptBound(9 * 7)


@pytest.mark.parametrize(
    "parts",
    [
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": " +"}, "content": " "}},
        {"normalizer": {"type": "Replace", "pattern": {"String": "  "}, "content": " "}},
        {"normalizer": {"type": "Sequence", "normalizers": [BLANKS, {"type": "StripAccents"}]}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}},
        {"pre_tokenizer": {"type": "WhitespaceSplit"}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}}},
        {"model": {"type": "WordPiece", "vocab": {"a": 0}}},
        {"model": {**MODEL, "byte_fallback": False}},
        {"model": {**MODEL, "vocab": {"a": 0}}},
        {"model": {**MODEL, "vocab": {"a": 0}, "unk_token": "a", "fuse_unk": True}},
        {"model": {**MODEL, "end_of_word_suffix": "</w>"}},
        {"model": {"type": "Unigram", "vocab": [["a", 0.0]], "byte_fallback": True}},
        {"added_tokens": [{"content": "<m>", "lstrip": True, "rstrip": False, "normalized": True}]},
    ],
)
def test_what_deletes_text_has_no_bound(parts: dict[str, Any]) -> None:
    assert prompt_bound(tokenizer_of(**parts)) is None


def test_bytes_without_a_token_count_for_nothing() -> None:
    letters = [letter for letter, byte in byte_letters().items() if byte not in b"\x04\x05\xf5"]
    model: dict[str, Any] = {
        "type": "BPE",
        "vocab": {letter: index for index, letter in enumerate(letters)},
    }
    parts = {
        "model": model,
        "pre_tokenizer": BYTE_LEVEL,
        "added_tokens": [],
    }
    tokenizer = tokenizer_of(**parts, normalizer=None)
    bound = prompt_bound(tokenizer)
    assert bound == PromptBound(4, b"\x04\x05")
    assert not bound.excludes("\x04\x05" * 1000 + "a" * 40, 10)
    assert bound.excludes("\x04\x05" * 1000 + "a" * 41, 10)
    library = Tokenizer.from_str(json.dumps(FILE | tokenizer | {"model": model | {"merges": []}}))
    assert library.encode("a\x04\x04\x04b").ids == [model["vocab"]["a"], model["vocab"]["b"]]
    assert prompt_bound(tokenizer_of(**parts, normalizer={"type": "NFC"})) is None
    assert set(byte_letters()) == set(ByteLevel.alphabet())


def test_a_token_that_swallows_blanks_lifts_the_bound(tmp_path: Path) -> None:
    codec = Codec(ZOO["added_lstrip_rstrip"](tmp_path / "tokenizer"))
    text = "a[TOOL]" + " " * 1000
    assert len(codec.encode(text, special=False)) < 10
    assert codec.bound is not None
    assert not codec.bound.excludes(text, 10)
    assert codec.bound.excludes(" " * 1000, 10)


def test_a_text_that_is_surely_too_long_is_not_tokenized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eoracc.runtime.decode.text import Tokenizer as ArtifactTokenizer
    from tests.tiny_artifact import write_byte_tokenizer

    folder = write_byte_tokenizer(tmp_path, chat=True)
    (folder / "genai_config.json").write_text(
        json.dumps({"model": {"bos_token_id": 1, "eos_token_id": 2, "vocab_size": 260}})
    )
    tokenizer = ArtifactTokenizer(folder)
    long = " " * 1_000_000
    assert len(tokenizer.encode_prompt("a" * 20, limit=10)) == 20  # not known without tokenizing
    monkeypatch.setattr(Codec, "encode", lambda *_, **__: pytest.fail("was tokenized"))
    with pytest.raises(PromptTooLongError, match=r"1000000 characters, more than 100 tokens"):
        tokenizer.encode_prompt(long, limit=100)
    with pytest.raises(PromptTooLongError, match=r"more than 100 tokens can hold: shorten it"):
        tokenizer.encode_prompt([{"role": "user", "content": long}], limit=100)


def test_the_library_releases_the_lock_for_long_texts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which method is called is all that a test of milliseconds can see."""
    codec = Codec(ZOO["gpt2"](tmp_path / "tokenizer"))
    texts_of_both = ["a b" * 10, "a b" * 1000]
    expected = [codec._tokenizer.encode(text).ids for text in texts_of_both]
    called = []

    class Spy:
        def __init__(self, inner: Tokenizer) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of the library
            called.append(name)
            return getattr(self._inner, name)

    monkeypatch.setattr(codec, "_tokenizer", Spy(codec._tokenizer))
    assert [codec.encode(text) for text in texts_of_both] == expected
    assert called == ["encode", "encode_batch_fast"]
