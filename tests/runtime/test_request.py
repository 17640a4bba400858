from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from eoracc.runtime import Request, RequestError, Score
from eoracc.runtime.request import RequestOptions


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("max_new_tokens", -1, "max_new_tokens: must be 0 or more, not -1"),
        ("temperature", -0.1, "temperature: must be 0 or more, and finite, not -0.1"),
        ("temperature", math.inf, "temperature: must be 0 or more, and finite, not inf"),
        ("temperature", math.nan, "temperature: must be 0 or more, and finite, not nan"),
        ("top_k", -1, r"top_k: must be 0 \(all\) or more, not -1"),
        ("top_p", 0.0, "top_p: must be above 0 and at most 1, not 0.0"),
        ("top_p", 1.1, "top_p: must be above 0 and at most 1, not 1.1"),
        ("min_p", 1.1, "min_p: must be from 0 to 1, not 1.1"),
        ("seed", -1, "seed: must be 0 or more, not -1"),
        ("logprobs", -1, "logprobs: must be 0 or more, not -1"),
        ("stop", "\n", "stop: must be a list of strings, not"),
        ("stop", ("a", ""), "stop: a stop string may not be empty: leave it out"),
        ("min_new_tokens", -1, "min_new_tokens: must be from 0 to max_new_tokens, 256, not -1"),
        ("min_new_tokens", 257, "min_new_tokens: must be from 0 to max_new_tokens, 256, not 257"),
        ("repetition_penalty", 0.0, "repetition_penalty: must be above 0, and finite, not 0.0"),
        ("repetition_penalty", math.nan, "repetition_penalty: must be above 0, and finite"),
        ("presence_penalty", math.inf, "presence_penalty: must be finite, not inf"),
        ("frequency_penalty", math.nan, "frequency_penalty: must be finite, not nan"),
        ("logit_bias", {3: -math.inf}, r"logit_bias: must hold finite numbers, not \{3: -inf\}"),
        ("bad_words", "word", "bad_words: must be a list of strings, not 'word'"),
        ("bad_words", ["a", ""], "bad_words: a string may not be empty: leave it out"),
        (
            "adapter",
            {"a": math.nan},
            "adapter 'a': its weight must be from -10000 to 10000, not nan",
        ),
        ("adapter", {"a": -1e5}, "adapter 'a': its weight must be from -10000 to 10000, not -1"),
        ("adapter", {"a": 10**400}, "from -10000 to 10000, not an integer of 1329 bits"),
        ("adapter", {"a": "1"}, "from -10000 to 10000, not '1'"),
        ("adapter", {"a": None}, "from -10000 to 10000, not None"),
        ("adapter", {3: 1.0}, "adapter '3': its weight must be"),
        ("adapter", 3, "adapter: must be a name, or weights by name"),
        ("temperature", 10**400, "and finite, not an integer of 1329 bits"),
        ("temperature", "warm", "temperature: must be 0 or more, and finite, not 'warm'"),
        ("top_p", None, "top_p: must be above 0 and at most 1, not None"),
        ("repetition_penalty", 10**4000, "and finite, not an integer of 13288 bits"),
        ("presence_penalty", 10**400, "presence_penalty: must be finite, not an integer"),
        ("max_new_tokens", 1.5, "max_new_tokens: must be 0 or more, not 1.5"),
        ("min_new_tokens", "1", "min_new_tokens: must be from 0 to max_new_tokens, 256, not '1'"),
        ("logit_bias", {3: 10**5000}, "logit_bias: must hold finite numbers, not a dict"),
        ("logit_bias", [1], r"logit_bias: must hold finite numbers, not \[1\]"),
        ("stop", [b"a"], "stop: must be a list of strings"),
        ("stop", None, "stop: must be a list of strings, not None"),
    ],
)
def test_values_out_of_range_are_named(field: str, value: Any, problem: str) -> None:  # noqa: ANN401
    with pytest.raises(RequestError, match=problem):
        Request(prompt="a", **{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [("stop", "\x1b[2J" * 10_000), ("seed", -(10**4000)), ("adapter", {"\x1b" * 10_000: 1e9})],
)
def test_texts_are_short_and_printable(field: str, value: Any) -> None:  # noqa: ANN401
    with pytest.raises(RequestError) as caught:
        Request(prompt="a", **{field: value})
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_edges_of_the_ranges() -> None:
    Request(prompt="a", max_new_tokens=0, top_p=1e-9, min_p=1, logprobs=0, seed=0, stop=["x"])


def test_keywords_are_the_fields() -> None:
    fields = {field.name: field.type for field in dataclasses.fields(Request)}
    assert fields.pop("prompt") == "Prompt"
    assert fields.pop("max_new_tokens") == "int"
    keywords = {name: hint.__forward_arg__ for name, hint in RequestOptions.__annotations__.items()}
    assert keywords == fields


def test_perplexity() -> None:
    assert math.isclose(Score((1, 2, 3), (math.log(0.5), math.log(0.125))).perplexity, 4)
    assert math.isnan(Score((1,), ()).perplexity)
