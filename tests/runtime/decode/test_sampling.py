"""Choosing tokens: exact sets against a plain float64 oracle, frequencies by a chi-square test."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.errors import BackendError
from eoracc.runtime.decode.sampling import (
    choose,
    distribution,
    log_normalizer,
    target_logprobs,
    token_logprob,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10_000},
    {"top_p": 0.3},
    {"top_p": 0.95},
    {"top_p": 1e-9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 40, "top_p": 0.7},
    {"top_k": 40, "top_p": 0.99, "min_p": 0.05},
    {"top_p": 0.9, "min_p": 0.02},
]


def oracle(
    logits: NDArray[np.float32],
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> dict[int, float]:
    """The filters one after the other, each token looked at by itself."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    left = sorted(range(len(logits)), key=lambda token: (-weights[token], token))
    if top_k:
        left = left[:top_k]
    total = sum(weights[token] for token in left)
    kept: list[int] = []
    mass = 0.0
    for token in left:
        if mass >= top_p * total and top_p < 1:
            break
        kept.append(token)
        mass += weights[token]
    kept = [token for token in kept if weights[token] >= min_p * weights[kept[0]]]
    total = sum(weights[token] for token in kept)
    return {token: weights[token] / total for token in kept}


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("size", [5, 300, 3000])
def test_distribution_is_that_of_the_filters_one_by_one(
    filters: dict[str, Any], temperature: float, size: int
) -> None:
    logits = np.random.default_rng(size).normal(0, 3, size).astype(np.float32)
    ids, probabilities = distribution(logits, temperature=temperature, **filters)
    expected = oracle(logits, temperature, **filters)
    assert ids.tolist() == sorted(expected)
    # An exponent is rounded twice, as is its exponential, and so is what that is divided by.
    bound = 2 * (2 * float(np.ptp(logits)) / temperature + 4) * 2.0**-24
    assert bound < 1e-3
    np.testing.assert_allclose(probabilities, [expected[one] for one in ids.tolist()], rtol=bound)


def test_of_equally_likely_tokens_lower_ids_stay() -> None:
    logits = np.array([1, 5, 5, 1, 5, 5], np.float32)
    choices: list[dict[str, Any]] = [{"top_k": 3}, {"top_p": 0.6}]
    for filters in choices:
        ids, probabilities = distribution(logits, temperature=1.0, **filters)
        assert ids.tolist() == [1, 2, 4]
        np.testing.assert_allclose(probabilities, [1 / 3] * 3, rtol=1e-15)


def test_extremes_leave_one_token() -> None:
    logits = np.array([0, -np.inf, 3, 3.5], np.float32)
    ids, probabilities = distribution(logits, temperature=1e-310)
    assert ids[probabilities > 0].tolist() == [3]
    assert probabilities.sum() == 1


@pytest.mark.parametrize("filters", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_frequencies_are_the_probabilities(filters: dict[str, Any]) -> None:
    from scipy.stats import chisquare

    logits = np.random.default_rng(0).normal(0, 1.5, 20).astype(np.float32)
    expected = oracle(logits, 0.8, **filters)
    rng = np.random.default_rng(7)
    draws = 20_000
    drawn = [choose(logits, rng.random, temperature=0.8, **filters) for _ in range(draws)]
    counts = np.bincount(drawn, minlength=len(logits))
    assert set(np.flatnonzero(counts)) <= set(expected)
    tokens = sorted(expected)
    wanted = [expected[token] * draws for token in tokens]
    assert chisquare(counts[tokens], wanted).pvalue > 0.01
    # A temperature that is a tenth off would be seen.
    other = oracle(logits, 0.88, **filters)
    if set(other) == set(expected):
        wrong = [other[token] * draws for token in tokens]
        assert chisquare(counts[tokens], wrong).pvalue < 1e-4


def test_greedy_takes_the_lowest_of_equals_and_no_random_number() -> None:
    logits = np.array([0, 2, 2, 1], np.float32)
    rng = np.random.default_rng(0)
    before = rng.bit_generator.state
    assert choose(logits, rng.random, temperature=0) == 1
    assert rng.bit_generator.state == before


def test_one_number_a_token() -> None:
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    rng, same = np.random.default_rng(3), np.random.default_rng(3)
    for filters in FILTERS[3:]:
        choose(logits, rng.random, temperature=1.0, **filters)
        same.random()
    assert rng.bit_generator.state == same.bit_generator.state


@pytest.mark.parametrize("bad", [[np.nan, 1], [1, np.nan], [-np.inf, -np.inf], [np.inf, 0]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: list[float], temperature: float) -> None:
    with pytest.raises(BackendError, match="logits are not finite"):
        choose(np.array(bad, np.float32), np.random.default_rng(0).random, temperature=temperature)


def test_log_probabilities() -> None:
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 5, (4, 1000)).astype(np.float32)
    exact = logits.astype(np.float64)
    exact -= np.log(np.exp(exact - exact.max(-1, keepdims=True)).sum(-1, keepdims=True))
    exact -= logits.astype(np.float64).max(-1, keepdims=True)
    # Each term's exponential is rounded to float32, from an exponent rounded to float32.
    spread = float(logits.max() - logits.min())
    bound = 4 * (spread + 1) * 2.0**-24
    assert bound < 1e-4
    targets = np.array([3, 999, 0, int(logits[3].argmax())])
    logprobs, greedy = target_logprobs(logits, targets)
    np.testing.assert_allclose(logprobs, exact[np.arange(4), targets], rtol=0, atol=bound)
    assert greedy.tolist() == (exact.argmax(-1) == targets).tolist()
    assert greedy[3]
    np.testing.assert_allclose(np.exp(logits - log_normalizer(logits)[:, None]).sum(-1), 1, 1e-5)
    one = token_logprob(logits[0], 3, 5)
    assert one.token == 3
    assert abs(one.logprob - exact[0, 3]) < bound
    assert [token for token, _ in one.top] == np.argsort(-exact[0])[:5].tolist()
    np.testing.assert_allclose(
        [logprob for _, logprob in one.top], np.sort(exact[0])[::-1][:5], rtol=0, atol=bound
    )
    assert token_logprob(logits[0], 3, 0).top == ()
    assert len(token_logprob(logits[0], 3, 5000).top) == 1000
