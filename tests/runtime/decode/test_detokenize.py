"""Pieces add up to the text of all tokens at once, whatever the bytes are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eoracc.runtime.decode.detokenize import TextStream, clean_up_spaces

if TYPE_CHECKING:
    from collections.abc import Sequence


def joined_bytes(tokens: Sequence[bytes]) -> str:
    """How byte-level decoders read tokens."""
    return b"".join(tokens).decode("utf-8", "replace")


def pieces(stream: TextStream, tokens: Sequence[object]) -> list[str]:
    return [stream.decode(token) for token in tokens]  # type: ignore[arg-type]


BYTES = st.one_of(
    st.sampled_from([b"\xe6", b"\x97", b"\xa5", b"\xa5\xe6", b"\xf0\x9f", b"\x98\x80", b"\xff"]),
    st.text("ab \u65e5\U0001f600\ufffd", max_size=3).map(str.encode),
)


@given(st.lists(BYTES, max_size=40), st.lists(BYTES, max_size=4))
def test_pieces_add_up(tokens: list[bytes], before: list[bytes]) -> None:
    stream = TextStream(joined_bytes, before=before)  # type: ignore[arg-type]
    shown = joined_bytes(before).rstrip("\ufffd")
    text = "".join(pieces(stream, tokens)) + stream.flush()
    whole = joined_bytes([*before, *tokens])
    # Bytes before that are no character may or may not become one.
    assert whole.endswith(text)
    assert len(whole) - len(text) <= len(joined_bytes(before))
    assert whole == joined_bytes(before)[: len(whole) - len(text)] + text
    assert len(shown) <= len(whole) - len(text) + 3


def test_incomplete_characters_wait() -> None:
    stream = TextStream(joined_bytes)  # type: ignore[arg-type]
    tokens = [b"a\xe6", b"\x97", b"\xa5\xe6", b"\x97", b"\xa5", b"\xf0\x9f"]
    assert pieces(stream, tokens) == ["a", "", "\u65e5", "", "\u65e5", ""]
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_bytes_that_become_no_character_do_not_pile_up() -> None:
    longest = 0

    def decode(tokens: Sequence[bytes]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return joined_bytes(tokens)

    stream = TextStream(decode)  # type: ignore[arg-type]
    tokens = [b"\xff", b"\xef\xbf\xbd"] * 500
    text = "".join(pieces(stream, tokens)) + stream.flush()
    assert text == joined_bytes(tokens)
    assert longest < 100


def test_skipped_tokens_have_no_text_and_break_no_character() -> None:
    stream = TextStream(joined_bytes, skipped={b"<s>"})  # type: ignore[arg-type]
    assert pieces(stream, [b"<s>", b"\xe6\x97", b"<s>", b"\xa5"]) == ["", "", "", "\u65e5"]


def test_clean_up_is_that_of_transformers(tmp_path: object) -> None:
    from transformers import AutoTokenizer

    from tests.tokenizer_zoo import ZOO

    tokenizer = AutoTokenizer.from_pretrained(ZOO["gpt2"](tmp_path))  # type: ignore[arg-type]
    text = "a . b ? c ! d , e ' f don n't g 'm h 's i 've j 're  ' s  . k"
    assert clean_up_spaces(text) == tokenizer.clean_up_tokenization(text)


@given(st.lists(st.text(" .?!,'nmstverx", max_size=4), max_size=20))
def test_clean_up_does_not_depend_on_the_pieces(words: list[str]) -> None:
    stream = TextStream("".join, clean_up=True)  # type: ignore[arg-type]
    text = "".join(pieces(stream, words)) + stream.flush()
    assert text == clean_up_spaces("".join(words))


@pytest.mark.parametrize(("text", "shown"), [("a", "a"), ("a n", "a"), ("a nx", "a nx")])
def test_little_is_held_back_for_the_clean_up(text: str, shown: str) -> None:
    stream = TextStream("".join, clean_up=True)  # type: ignore[arg-type]
    assert stream.decode(text) == shown  # type: ignore[arg-type]
