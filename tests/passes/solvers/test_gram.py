from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eoracc.passes.solvers.gram import accumulate_cross, accumulate_gram
from tests.passes.groups import ones

WIDTH = 20

Tokens = tuple[NDArray[np.float32], NDArray[np.float32]]


@pytest.fixture
def tokens() -> Tokens:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((3001, WIDTH)).astype(np.float32)
    weights = rng.choice(np.array([0, 0.25, 1, 2], np.float32), size=3001)
    return inputs, weights


def oracle(inputs: NDArray[np.float32], weights: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = inputs.astype(np.float64)
    total: NDArray[np.float64] = np.einsum("t,ti,tj->ij", weights.astype(np.float64), wide, wide)
    return total


def tolerance(inputs: NDArray[np.float32], weights: NDArray[np.float32]) -> float:
    # Sums of at most 2048 float32 products, whose magnitudes add up to at most the trace.
    trace = float((weights[:, None] * inputs.astype(np.float64) ** 2).sum())
    return 2048 * float(np.finfo(np.float32).eps) / 2 * trace / WIDTH


def test_matches_the_sum_over_tokens_in_float64(tokens: Tokens) -> None:
    inputs, weights = tokens
    gram = accumulate_gram([(inputs, weights)], WIDTH)
    limit = tolerance(inputs, weights)
    assert limit < 1e-2 * np.diagonal(gram.matrix).min()
    np.testing.assert_allclose(gram.matrix, oracle(inputs, weights), rtol=0, atol=limit)
    assert gram.matrix.dtype == np.float64
    assert gram.tokens == pytest.approx(weights.sum(dtype=np.float64))


def test_does_not_depend_on_batch_size_order_or_sharding(tokens: Tokens) -> None:
    inputs, weights = tokens
    whole = accumulate_gram([(inputs, weights)], WIDTH)
    order = np.random.default_rng(1).permutation(len(inputs))
    cuts = [0, 1, 700, 2999, 3001]
    pieces = [(inputs[order][a:b], weights[order][a:b]) for a, b in pairwise(cuts)]
    sharded = accumulate_gram(pieces, WIDTH)
    limit = tolerance(inputs, weights)
    np.testing.assert_allclose(sharded.matrix, whole.matrix, rtol=0, atol=limit)
    assert sharded.tokens == pytest.approx(whole.tokens)


def test_padding_counts_for_nothing_whatever_it_holds(tokens: Tokens) -> None:
    inputs, weights = tokens
    padding = np.full((5, WIDTH), np.nan, np.float32)
    padded = accumulate_gram(
        [(np.concatenate([padding, inputs]), np.concatenate([np.zeros(5, np.float32), weights]))],
        WIDTH,
    )
    np.testing.assert_array_equal(padded.matrix, accumulate_gram([(inputs, weights)], WIDTH).matrix)


def test_cross_products_are_sums_over_tokens_too(tokens: Tokens) -> None:
    inputs, weights = tokens
    other = np.random.default_rng(3).standard_normal(inputs.shape).astype(np.float32)
    other[weights == 0] = np.nan
    cuts = [0, 1, 700, 2999, 3001]
    pieces = [(other[a:b], inputs[a:b], weights[a:b]) for a, b in pairwise(cuts)]
    kept = weights > 0
    roots = np.sqrt(weights[kept].astype(np.float64))[:, None]
    left, right = roots * other[kept], roots * inputs[kept]
    expected = left.T @ right
    limit = 2052 * 2.0**-24 * (np.abs(left).T @ np.abs(right))
    assert limit.max() < 0.05 * np.abs(expected - expected.T).max()
    for batches in (pieces, [(other, inputs, weights)]):
        assert np.all(np.abs(accumulate_cross(batches, WIDTH) - expected) <= limit)


def test_no_tokens_give_a_gram_of_zeros() -> None:
    gram = accumulate_gram([], WIDTH)
    assert gram.tokens == 0
    assert not gram.matrix.any()


@pytest.mark.parametrize("count", [1, 7, 300])
def test_root_squares_to_the_gram_also_where_it_is_singular(count: int) -> None:
    inputs = np.random.default_rng(2).standard_normal((count, WIDTH)).astype(np.float32)
    gram = accumulate_gram([(inputs, ones(count))], WIDTH)
    # Float32 products leave a singular Gram slightly indefinite; the root drops what is negative.
    limit = WIDTH * float(np.finfo(np.float32).eps) * float(np.trace(gram.matrix))
    assert limit < 1e-4 * np.trace(gram.matrix)
    np.testing.assert_allclose(gram.root @ gram.root.T, gram.matrix, rtol=0, atol=limit)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    batch=st.integers(1, 12),
    shards=st.integers(1, 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_batching_order_and_sharding_of_padded_windows_gives_one_gram(
    lengths: list[int], batch: int, shards: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    windows = rng.standard_normal((len(lengths), 9, WIDTH)).astype(np.float32)
    mask = (np.arange(9) < np.array(lengths)[:, None]).astype(np.float32)
    windows[mask == 0] = 1e6  # padding holds whatever it likes
    order = rng.permutation(len(lengths))
    pieces = [
        (windows[part].reshape(-1, WIDTH), mask[part].reshape(-1))
        for shard in np.array_split(order, shards)
        for part in np.array_split(shard, -(-len(shard) // batch) or 1)
    ]
    gram = accumulate_gram(pieces, WIDTH)
    kept = windows[mask == 1]
    expected = oracle(kept, ones(len(kept)))
    limit = tolerance(kept, ones(len(kept)))
    np.testing.assert_allclose(gram.matrix, expected, rtol=0, atol=limit)
    assert gram.tokens == sum(lengths)


def test_magnitudes_are_means_over_what_is_not_masked() -> None:
    rng = np.random.default_rng(8)
    inputs = rng.standard_normal((60, WIDTH)).astype(np.float32)
    weights = rng.integers(0, 3, 60).astype(np.float32)
    pieces = [(inputs[:25], weights[:25]), (inputs[25:], weights[25:])]
    gram = replace(accumulate_gram(pieces, WIDTH), activations=lambda: iter(pieces))
    expected = np.average(np.abs(inputs.astype(np.float64)), axis=0, weights=weights)
    np.testing.assert_allclose(gram.magnitudes, expected, rtol=60 * float(np.finfo(np.float32).eps))
    nothing = replace(accumulate_gram([], WIDTH), activations=lambda: iter(()))
    assert not nothing.magnitudes.any()


def test_magnitudes_need_the_activations() -> None:
    with pytest.raises(ValueError, match="are gone"):
        _ = accumulate_gram([], WIDTH).magnitudes


def test_the_top_has_so_many_directions_and_is_made_once(tokens: Tokens) -> None:
    gram = accumulate_gram([tokens], WIDTH)
    top = gram.top(3)
    values, vectors = np.linalg.eigh(gram.matrix)
    expected = (vectors[:, -3:] * values[-3:]) @ vectors[:, -3:].T
    rounding = WIDTH**2 * float(np.finfo(np.float64).eps) * values[-1]
    np.testing.assert_allclose(top.matrix, expected, rtol=0, atol=10 * rounding)
    assert 10 * rounding < 1e-6 * values[-3]
    assert top.tokens == gram.tokens
    assert gram.top(3) is top
    assert gram.top(WIDTH) is gram
