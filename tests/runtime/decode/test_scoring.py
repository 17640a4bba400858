"""Scores against whole runs without a cache, in float64."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.runtime import Model, RequestError, load
from eoracc.runtime.decode import scoring
from eoracc.runtime.onnxruntime.session import Session, open_session

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from eoracc.runtime.onnxruntime.rows import GraphRows

TEXT = "a state of the union, and of some other things too"
UNIT_ROUNDOFF = 2.0**-24


@pytest.fixture(scope="module")
def model(tiny_artifact: Path) -> Model:
    return load(tiny_artifact, threads=1)


@pytest.fixture(scope="module")
def reference(tiny_artifact: Path) -> Session:
    return open_session(tiny_artifact, library=False, threads=1)


def exact(reference: Session, tokens: list[int]) -> tuple[NDArray[np.float64], float]:
    """Log probabilities ``[S, V]``, and how far float32 may be off."""
    logits = reference.run(np.array([tokens]))[0][0].astype(np.float64)
    # See test_batch.py; the normalizer moves by as much as the logits do.
    bound = 4 * (2 * 7 + 1) * 88 * UNIT_ROUNDOFF * float(np.abs(logits).max())
    assert bound < 2e-3 * float(logits.std())
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return logits, bound


def test_score_of_a_text(model: Model, reference: Session) -> None:
    score = model.score(TEXT)
    assert list(score.tokens) == model.encode(TEXT)
    logprobs, bound = exact(reference, list(score.tokens))
    expected = logprobs[np.arange(len(score.tokens) - 1), score.tokens[1:]]
    np.testing.assert_allclose(score.logprobs, expected, rtol=0, atol=bound)
    assert math.isclose(score.perplexity, math.exp(-expected.mean()), rel_tol=2 * bound)
    assert model.score(score.tokens) == score


def test_long_text_in_chunks(
    model: Model, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = [(17 * index) % 250 for index in range(120)]
    logprobs, bound = exact(reference, tokens)
    expected = logprobs[np.arange(119), tokens[1:]]
    for chunk in (7, 64, 118, 119):
        monkeypatch.setattr(scoring, "PREFILL_CHUNK", chunk)
        np.testing.assert_allclose(model.score(tokens).logprobs, expected, rtol=0, atol=bound)


def test_continuations_in_batches_equal_each_alone(
    model: Model, reference: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(20):
        context, following = rng.integers(1, 40), rng.integers(1, 9)
        pairs.append(
            (rng.integers(4, 260, context).tolist(), rng.integers(4, 260, following).tolist())
        )
    # One continuation that greedy decoding makes, and one that differs in its last token only.
    context = pairs[0][0]
    greedy = list(model.generate(context, 4, ignore_end=True).tokens)
    pairs += [(context, greedy), (context, [*greedy[:3], (greedy[3] + 1) % 260])]
    scores = model.score_continuations(pairs)
    for (context, following), score in zip(pairs, scores, strict=True):
        logprobs, bound = exact(reference, [*context, *following])
        places = np.arange(len(following)) + len(context) - 1
        np.testing.assert_allclose(score.logprobs, logprobs[places, following], rtol=0, atol=bound)
        assert math.isclose(score.logprob, sum(score.logprobs), rel_tol=1e-12)
        assert score.greedy == (logprobs[places].argmax(-1) == following).all()
        assert score.tokens == tuple(following)
    assert [score.greedy for score in scores[-2:]] == [True, False]
    monkeypatch.setattr(scoring, "PREFILL_CHUNK", 5)
    for score, chunked in zip(scores, model.score_continuations(pairs), strict=True):
        np.testing.assert_allclose(score.logprobs, chunked.logprobs, rtol=0, atol=2 * bound)


def test_what_is_asked_twice_is_computed_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = []
    group = scoring._score_group

    def noted(batch: GraphRows, texts: Sequence[scoring._Text]) -> None:
        runs.append(len(texts))
        group(batch, texts)

    monkeypatch.setattr(scoring, "_score_group", noted)
    choices = [([5, 6, 7], [choice]) for choice in (65, 66, 67, 68)]
    scores = model.score_continuations([*choices, ([5, 6], [7, 65])])
    assert runs == [1]
    assert len({score.logprobs for score in scores[:4]}) == 4
    assert scores[4].logprobs[1] == scores[0].logprobs[0]


def test_text_pairs_are_cut_where_the_context_ends(model: Model) -> None:
    assert model.split("one ", "two") == (model.encode("one"), model.encode(" two"))
    assert model.split("one", " two") == (model.encode("one"), model.encode(" two"))
    assert model.split("", "two") == ([1], model.encode("two"))
    assert model.split([3], "two") == ([3], model.encode("two"))
    assert model.split([], [4]) == ([1], [4])
    assert model.score_continuations([("one ", "two")]) == model.score_continuations(
        [("one", " two")]
    )


def test_bounds(model: Model) -> None:
    with pytest.raises(RequestError, match="the text is empty"):
        model.score("")
    assert math.isnan(model.score("a").perplexity)
    with pytest.raises(RequestError, match="the text has 130 tokens, the model takes 128"):
        model.score([5] * 130)
    assert len(model.score([5] * 129).logprobs) == 128
    with pytest.raises(RequestError, match="pair 1: its continuation is empty"):
        model.score_continuations([("a", "b"), ("a", "")])
    with pytest.raises(RequestError, match="pair 0: the text has 130 tokens"):
        model.score_continuations([([5] * 129, [5])])
    with pytest.raises(RequestError, match=r"a token is not in 0\.\.259"):
        model.score([3, 260])
    with pytest.raises(RequestError, match="adapter 'math': the artifact takes no adapters"):
        model.score("ab", adapter="math")
    assert model.score_continuations([]) == []
