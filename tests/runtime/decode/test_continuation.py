"""One text, from logits that a test makes to its pieces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.runtime import Request, TokenLogprob
from eoracc.runtime.decode.continuation import Continuation, complete
from eoracc.runtime.decode.text import Tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from eoracc.runtime import Completion

VOCABULARY = 260
END = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_artifact: Path) -> Tokenizer:
    """Its tokens are single bytes."""
    return Tokenizer(tiny_artifact)


def follow(tokenizer: Tokenizer, tokens: list[int], **options: Any) -> Completion:  # noqa: ANN401
    """The text of a model that wants ``tokens``, each followed by "z" if it may not have it."""
    (last_resort,) = tokenizer.encode("z")
    options.setdefault("max_new_tokens", len(tokens))
    request = Request(prompt=[5], **options)
    continuation = Continuation(
        request,
        tokenizer,
        prompt=[5],
        limit=request.max_new_tokens,
        bad_words=tokenizer.encode_words(request.bad_words),
        place=-1,
        listener=print,
    )
    pieces = []
    for token in tokens:
        logits = np.zeros(VOCABULARY, np.float32)
        logits[last_resort], logits[token] = 1, 2
        piece = continuation.push(logits)
        if piece is not None:
            pieces.append(piece)
        if continuation.finish_reason is not None:
            break
    return complete(pieces, 1)


def test_offsets_are_those_of_the_characters(tokenizer: Tokenizer) -> None:
    text = "a\u00e9\U0001f600 z\u20ac"
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text.encode())
    for stop in ((), ("\u00e9x", "\u20ac\u20ac")):  # which hold text back
        completion = follow(tokenizer, [*tokens, END], logprobs=0, stop=stop)
        assert completion.text == text
        assert completion.logprobs is not None
        assert [entry.offset for entry in completion.logprobs] == [
            len(text.encode()[:place].decode(errors="ignore")) for place in range(len(tokens))
        ]


def test_tokens_without_text_have_the_offset_of_the_next(tokenizer: Tokenizer) -> None:
    tokens = [*tokenizer.encode("a"), END, END, *tokenizer.encode("b")]
    completion = follow(tokenizer, tokens, logprobs=0, ignore_end=True)
    assert completion.text == "ab"
    logprobs: tuple[TokenLogprob, ...] = completion.logprobs or ()
    assert [entry.offset for entry in logprobs] == [0, 1, 1, 1]


def test_stop_tokens(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("hello")
    (stop,) = tokenizer.encode("l")
    for ignore_end in (False, True):
        left_out = follow(tokenizer, tokens, stop_token_ids=[stop], ignore_end=ignore_end)
        assert (left_out.text, left_out.finish_reason) == ("he", "stop")
        assert list(left_out.tokens) == tokens[:2]
    kept = follow(tokenizer, tokens, stop_token_ids=[stop], include_stop=True, logprobs=0)
    assert (kept.text, kept.finish_reason) == ("hel", "stop")
    assert list(kept.tokens) == tokens[:3]
    assert len(kept.logprobs or ()) == 3
    # What was held back for a stop string comes before the token that ends the text.
    held = follow(tokenizer, tokens, stop=["ex"], stop_token_ids=[stop], include_stop=True)
    assert held.text == "hel"
    special = follow(tokenizer, [*tokens, END], include_stop=True, max_new_tokens=9)
    assert (special.text, special.tokens[-1]) == ("hello", END)


def test_include_stop_keeps_the_string(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("hello")
    assert follow(tokenizer, tokens, stop=["ll"], include_stop=True).text == "hell"
    assert follow(tokenizer, tokens, stop=["ll"]).text == "he"


@pytest.mark.parametrize(("least", "text"), [(2, "ab"), (3, "abzc"), (4, "abzc"), (5, "abzcz")])
@pytest.mark.parametrize("end", [END, "!"])
def test_min_new_tokens(tokenizer: Tokenizer, least: int, text: str, end: int | str) -> None:
    token = end if isinstance(end, int) else tokenizer.encode(end)[0]
    a, b, c = tokenizer.encode("abc")
    completion = follow(
        tokenizer, [a, b, token, c, token], stop_token_ids=[token], min_new_tokens=least
    )
    assert completion.text == text


def test_stop_strings_do_not_end_the_text_too_early(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("abcabcab")
    assert follow(tokenizer, tokens, stop=["bc"]).text == "a"
    assert follow(tokenizer, tokens, stop=["bc"], min_new_tokens=2).text == "a"
    assert follow(tokenizer, tokens, stop=["bc"], min_new_tokens=3).text == "abca"
    assert follow(tokenizer, tokens, stop=["bc"], min_new_tokens=6).text == "abcabcab"


def test_bad_words(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("foo food")
    assert follow(tokenizer, tokens, bad_words=["oo"]).text == "foz fozd"
    assert follow(tokenizer, tokens, bad_words=[" f"]).text == "foo zood"
    assert follow(tokenizer, tokens, bad_words=["f", "d"]).text == "zoo zooz"
