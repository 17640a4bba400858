"""The two-sided closed form against Eckart-Young, inverses, and a numeric search."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.solvers.factors import (
    eora_factors,
    gram_root,
    output_weighted_factors,
    weighted_norm,
)

Float = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
SHAPES = [(24, 40), (40, 24), (31, 31), (1, 9), (9, 1)]
KINDS = ["full", "singular", "one token", "dead rows", "zero"]


def make_gram(kind: str, width: int, rng: np.random.Generator) -> Float:
    tokens = {"singular": max(1, width // 2), "one token": 1}.get(kind, 4 * width)
    rows = rng.standard_normal((tokens, width)) * np.geomspace(3, 0.1, width)
    if kind == "dead rows":
        rows[:, 1::3] = 0
    if kind == "zero":
        rows[:] = 0
    gram: Float = rows.T @ rows
    return gram


def root_of(gram: Float) -> Float:
    values, vectors = np.linalg.eigh(gram)
    root: Float = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def solved(
    delta: NDArray[np.floating], gram: Float, output_gram: NDArray[np.floating], rank: int
) -> tuple[Float, Float]:
    root = gram_root(output_gram.astype(np.float64)).T
    return output_weighted_factors(delta, gram, root, rank)


def error(delta: NDArray[np.floating], gram: Float, output_gram: Float) -> float:
    return float(np.trace(output_gram @ delta @ gram @ delta.T))


@pytest.mark.parametrize("outputs", KINDS)
@pytest.mark.parametrize("inputs", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_left_is_the_tail_of_the_singular_values(
    shape: tuple[int, int], inputs: str, outputs: str
) -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(shape)
    gram, output_gram = make_gram(inputs, shape[1], rng), make_gram(outputs, shape[0], rng)
    singular = np.linalg.svd(root_of(output_gram) @ delta @ root_of(gram), compute_uv=False)
    whole = float((singular**2).sum())
    limit = 100 * max(shape) * EPS * whole
    for rank in {0, 1, min(shape) // 2, min(shape)}:
        b, a = solved(delta, gram, output_gram, rank)
        assert (b.shape, a.shape) == ((shape[0], rank), (rank, shape[1]))
        left = error(delta - b @ a, gram, output_gram)
        assert left == pytest.approx(float((singular[rank:] ** 2).sum()), abs=limit)


@pytest.mark.parametrize("inputs", ["full", "singular", "one token"])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_that_count_alike_make_it_eora(shape: tuple[int, int], inputs: str) -> None:
    rng = np.random.default_rng(1)
    delta, gram = rng.standard_normal(shape), make_gram(inputs, shape[1], rng)
    rank = max(1, min(shape) // 3)
    b, a = solved(delta, gram, 7.0 * np.eye(shape[0]), rank)
    plain_b, plain_a = eora_factors(delta, gram, rank)
    # Only what they give of the inputs is unique. Its square cancels down to rounding.
    limit = np.sqrt(100 * max(shape) * EPS) * weighted_norm(delta, gram)
    assert weighted_norm(b @ a - plain_b @ plain_a, gram) < limit
    other_b, other_a = eora_factors(delta, np.eye(shape[1]), rank)
    if min(shape) > 1 and inputs == "full":
        assert weighted_norm(b @ a - other_b @ other_a, gram) > 1e3 * limit


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_is_what_the_inverses_of_both_roots_give(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    delta = rng.standard_normal(shape)
    gram, output_gram = (make_gram("full", side, rng) for side in shape[::-1])
    left, right = root_of(output_gram), root_of(gram)
    u, s, vt = np.linalg.svd(left @ delta @ right)
    expected = np.linalg.solve(left, u[:, :5] * s[:5]) @ np.linalg.solve(right, vt[:5].T).T
    b, a = solved(delta, gram, output_gram, 5)
    np.testing.assert_allclose(b @ a, expected, atol=1e-8 * np.abs(expected).max())


def test_no_search_finds_less() -> None:
    rng = np.random.default_rng(3)
    delta, rank = rng.standard_normal((12, 18)), 3
    gram, output_gram = make_gram("full", 18, rng), make_gram("full", 12, rng)
    b, a = solved(delta, gram, output_gram, rank)
    least = error(delta - b @ a, gram, output_gram)
    for scale in (1e-3, 1e-1):
        for _ in range(20):
            turned = (b + scale * rng.standard_normal(b.shape)) @ (
                a + scale * rng.standard_normal(a.shape)
            )
            assert error(delta - turned, gram, output_gram) > least
    # Alternating least squares: for fixed A the best B asks for no G, for fixed B the best A for no
    # H.
    found: Float = rng.standard_normal((rank, 18))
    for _ in range(400):
        other = delta @ gram @ found.T @ np.linalg.inv(found @ gram @ found.T)
        inner = other.T @ output_gram
        found = np.asarray(np.linalg.solve(inner @ other, inner @ delta), np.float64)
    searched = error(delta - other @ found, gram, output_gram)
    assert least <= searched * (1 + 1e-9)
    assert searched == pytest.approx(least, rel=1e-3)


def test_weights_of_outputs_change_what_is_corrected() -> None:
    rng = np.random.default_rng(4)
    delta, gram = rng.standard_normal((20, 30)), make_gram("full", 30, rng)
    output_gram = make_gram("full", 20, rng)
    b, a = solved(delta, gram, output_gram, 4)
    plain_b, plain_a = eora_factors(delta, gram, 4)
    ours, plain = delta - b @ a, delta - plain_b @ plain_a
    assert error(ours, gram, output_gram) < 0.9 * error(plain, gram, output_gram)
    assert weighted_norm(plain, gram) < 0.98 * weighted_norm(ours, gram)
    # Rows that the weights leave out gain by it too: nothing gets worse than without factors.
    assert weighted_norm(ours, gram) < weighted_norm(delta, gram)


@pytest.mark.parametrize("kind", ["singular", "one token"])
def test_where_nothing_is_asked_it_still_takes_the_nearest(kind: str) -> None:
    rng = np.random.default_rng(5)
    delta, gram = rng.standard_normal((20, 30)), make_gram("full", 30, rng)
    output_gram = make_gram(kind, 20, rng)
    b, a = solved(delta, gram, output_gram, 1)
    values, vectors = np.linalg.eigh(output_gram)
    null = vectors[:, values < 1e-9 * values.max()]
    least = weighted_norm(null.T @ (delta - b @ a), gram)
    for scale in (-0.1, 0.1):
        moved = b + scale * null @ rng.standard_normal((null.shape[1], 1))
        assert weighted_norm(null.T @ (delta - moved @ a), gram) > least


def test_smaller_ranks_are_held_by_larger_ones() -> None:
    rng = np.random.default_rng(6)
    delta, gram = rng.standard_normal((20, 30)), make_gram("full", 30, rng)
    output_gram = make_gram("full", 20, rng)
    b, a = solved(delta, gram, output_gram, 9)
    small_b, small_a = solved(delta, gram, output_gram, 4)
    np.testing.assert_allclose(b[:, :4] @ a[:4], small_b @ small_a, atol=1e-9)


def test_what_the_weights_do_not_see_gets_no_factors() -> None:
    delta = np.zeros((6, 8))
    delta[3:] = np.random.default_rng(7).standard_normal((3, 8))
    output_gram = np.diag([1.0, 1.0, 1.0, 0.0, 0.0, 0.0])
    b, a = solved(delta, np.eye(8), output_gram, 2)
    assert not b.any()
    assert not (b @ a).any()


def test_float32_errors_cost_rounding_only() -> None:
    rng = np.random.default_rng(8)
    delta = rng.standard_normal((60, 80)).astype(np.float32)
    gram, output_gram = make_gram("full", 80, rng), make_gram("full", 60, rng)
    b, a = solved(delta, gram, output_gram.astype(np.float32), 16)
    exact_b, exact_a = solved(delta.astype(np.float64), gram, output_gram.astype(np.float32), 16)
    left = error(delta - b @ a, gram, output_gram)
    exact = error(delta - exact_b @ exact_a, gram, output_gram)
    # Squared singular values, each off by rounding of the largest at most.
    limit = 80 * float(np.finfo(np.float32).eps) * error(delta, gram, output_gram)
    assert left == pytest.approx(exact, abs=limit)
    assert limit < 1e-2 * exact


@pytest.mark.parametrize("rank", [-1, 4])
def test_refuses_a_rank_out_of_range(rank: int) -> None:
    with pytest.raises(ValueError, match=r"outside 0\.\.3"):
        solved(np.ones((3, 5)), np.eye(5), np.eye(3), rank)
