"""The closed forms against Eckart-Young in the weighted norm and the paper's own formula."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.solvers.factors import (
    activation_scale,
    energy_rank,
    eora_factors,
    gram_root,
    lqer_scale,
    scaled_factors,
    svd_factors,
    to_float16,
    top_of_gram,
    weighted_norm,
)

Float = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
HALF_EPS = float(np.finfo(np.float16).eps) / 2

SHAPES = [(24, 40), (40, 24), (31, 31), (1, 9), (9, 1)]
GRAMS = ["full", "singular", "one token", "dead columns"]


def make_gram(kind: str, width: int, rng: np.random.Generator) -> Float:
    tokens = {"full": 4 * width, "singular": max(1, width // 2), "one token": 1}.get(
        kind, 4 * width
    )
    inputs = rng.standard_normal((tokens, width)) * np.geomspace(10, 0.1, width)
    if kind == "dead columns":
        inputs[:, 1::3] = 0
    gram: Float = inputs.T @ inputs
    return gram


def symmetric_root(gram: Float) -> Float:
    values, vectors = np.linalg.eigh(gram)
    root: Float = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    return root


def eora_factors_projected(delta: Float, gram: Float, rank: int) -> tuple[Float, Float]:
    """Eq. 5-7 of arXiv:2410.21271: project with Q sqrt(Lambda), truncate, project back."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > values.max() * len(values) * EPS
    projection = vectors[:, kept] * np.sqrt(values[kept])
    inverse = (vectors[:, kept] / np.sqrt(values[kept])).T
    u, s, vt = np.linalg.svd(delta @ projection, full_matrices=False)
    return u[:, :rank] * s[:rank], vt[:rank] @ inverse


def tail(delta: Float, gram: Float, rank: int) -> float:
    singular = np.linalg.svd(delta @ symmetric_root(gram), compute_uv=False)
    return float((singular[rank:] ** 2).sum())


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_error_left_is_the_tail_of_the_weighted_singular_values(
    shape: tuple[int, int], kind: str
) -> None:
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(shape)
    gram = make_gram(kind, shape[1], rng)
    whole = weighted_norm(delta, gram) ** 2
    limit = 40 * max(shape) * EPS * whole
    for rank in {0, 1, min(shape) // 2, min(shape)}:
        b, a = eora_factors(delta, gram, rank)
        assert b.shape == (shape[0], rank)
        assert a.shape == (rank, shape[1])
        left = weighted_norm(delta - b @ a, gram) ** 2
        assert left == pytest.approx(tail(delta, gram, rank), abs=limit)
    assert limit < 1e-9 * whole


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_leaves_the_same_error_as_the_projected_form_of_the_paper(
    shape: tuple[int, int], kind: str
) -> None:
    rng = np.random.default_rng(1)
    delta = rng.standard_normal(shape)
    gram = make_gram(kind, shape[1], rng)
    rank = max(1, min(shape) // 3)
    b, a = eora_factors(delta, gram, rank)
    paper_b, paper_a = eora_factors_projected(delta, gram, rank)
    whole = weighted_norm(delta, gram) ** 2
    ours = weighted_norm(delta - b @ a, gram) ** 2
    theirs = weighted_norm(delta - paper_b @ paper_a, gram) ** 2
    # The paper's form divides by sqrt(Lambda), whose spread here is at most 1e2 times the width.
    assert ours == pytest.approx(theirs, abs=1e2 * max(shape) ** 2 * EPS * whole)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_gives_the_same_factors_as_the_paper_where_they_are_unique(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    rank = 4
    strong = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    delta = strong + 1e-3 * rng.standard_normal(shape)
    gram = make_gram("full", shape[1], rng)
    b, a = eora_factors(delta, gram, rank)
    paper_b, paper_a = eora_factors_projected(delta, gram, rank)
    singular = np.linalg.svd(delta @ symmetric_root(gram), compute_uv=False)
    # Davis and Kahan: rounding turns a singular subspace by eps over its squared relative gap.
    gap = (singular[rank - 1] ** 2 - singular[rank] ** 2) / singular[0] ** 2
    limit = 10 * max(shape) * EPS / gap * float(singular[0])
    assert limit < 1e-6 * singular[rank]
    assert weighted_norm(b @ a - paper_b @ paper_a, gram) < limit


def test_a_wrong_metric_is_noticed() -> None:
    rng = np.random.default_rng(2)
    delta = rng.standard_normal((20, 30))
    gram = make_gram("full", 30, rng)
    b, a = svd_factors(delta, 5)
    assert weighted_norm(delta - b @ a, gram) ** 2 > 1.2 * tail(delta, gram, 5)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_factors_leave_the_tail_of_the_singular_values(shape: tuple[int, int]) -> None:
    delta = np.random.default_rng(3).standard_normal(shape)
    for rank in {0, 1, min(shape)}:
        b, a = svd_factors(delta, rank)
        left = float(np.linalg.norm(delta - b @ a) ** 2)
        limit = 40 * max(shape) * EPS * float(np.linalg.norm(delta) ** 2)
        assert left == pytest.approx(tail(delta, np.eye(shape[1]), rank), abs=limit)


def test_an_error_weighted_beforehand_changes_nothing() -> None:
    rng = np.random.default_rng(4)
    delta = rng.standard_normal((18, 12)).astype(np.float32)
    gram = make_gram("full", 12, rng)
    for alone, shared in zip(
        eora_factors(delta, gram, 4),
        eora_factors(delta, gram, 4, weighted=delta @ gram_root(gram).astype(np.float32)),
        strict=True,
    ):
        np.testing.assert_array_equal(alone, shared)


def test_an_error_of_zero_gets_factors_of_zero() -> None:
    zeros = np.zeros((8, 6))
    for b, a in (eora_factors(zeros, np.eye(6), 3), svd_factors(zeros, 3)):
        assert not (b @ a).any()
        assert np.isfinite(b).all()
        assert np.isfinite(a).all()


@pytest.mark.parametrize("rank", [-1, 7])
def test_a_rank_out_of_range_is_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {rank} is outside 0\.\.6 of \[6, 8\]"):
        eora_factors(np.ones((6, 8)), np.eye(8), rank)
    with pytest.raises(ValueError, match=rf"rank {rank} is outside"):
        svd_factors(np.ones((6, 8)), rank)
    with pytest.raises(ValueError, match=rf"rank {rank} is outside"):
        scaled_factors(np.ones((6, 8)), np.ones(8), rank)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("magnitude", [1e-6, 1.0, 1e6])
def test_float16_costs_rounding_only_whatever_the_layer_s_scale(
    shape: tuple[int, int], magnitude: float
) -> None:
    rng = np.random.default_rng(5)
    delta = magnitude * rng.standard_normal(shape)
    gram = make_gram("full", shape[1], rng)
    rank = 8
    b, a = eora_factors(delta, gram, rank)
    np.testing.assert_allclose(
        np.linalg.norm(b, axis=0), np.linalg.norm(a, axis=1), rtol=40 * max(shape) * EPS
    )
    rounded = to_float16(b).astype(np.float64) @ to_float16(a).astype(np.float64)
    # Each product of two rounded entries is off by at most 2 u, relatively.
    limit = 2.1 * HALF_EPS * weighted_norm(np.abs(b) @ np.abs(a), np.abs(gram))
    left = weighted_norm(delta - b @ a, gram)
    assert limit < 0.1 * left
    assert weighted_norm(rounded - b @ a, gram) < limit


def test_float16_does_not_overflow() -> None:
    assert np.isfinite(to_float16(np.array([1e9, -1e9, 65519.0]))).all()


def test_weighted_norm_is_the_norm_of_the_output() -> None:
    rng = np.random.default_rng(6)
    inputs = rng.standard_normal((50, 7))
    delta = rng.standard_normal((5, 7))
    expected = np.linalg.norm(delta @ inputs.T)
    assert weighted_norm(delta, inputs.T @ inputs) == pytest.approx(expected, rel=50 * 7 * EPS)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_factors_leave_the_tail_in_their_diagonal_metric(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(7)
    delta = rng.standard_normal(shape)
    scale = np.geomspace(3, 0.1, shape[1])
    scale[1::4] = 0
    metric = np.diag(scale**2)
    whole = weighted_norm(delta, metric) ** 2
    for rank in {0, 1, min(shape) // 2, min(shape)}:
        b, a = scaled_factors(delta, scale, rank)
        left = weighted_norm(delta - b @ a, metric) ** 2
        limit = 40 * max(shape) * EPS * whole
        assert left == pytest.approx(tail(delta, metric, rank), abs=limit)


@pytest.mark.parametrize("shape", SHAPES)
def test_scaled_factors_are_the_published_ones_without_the_inverse(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(8)
    delta = rng.standard_normal(shape)
    scale = np.geomspace(3, 0.1, shape[1])
    rank = max(1, min(shape) // 3)
    b, a = scaled_factors(delta, scale, rank)
    u, s, vt = np.linalg.svd(delta * scale, full_matrices=False)
    published = (u[:, :rank] * s[:rank]) @ (vt[:rank] / scale)
    # Davis and Kahan, once more: the gap behind the last kept singular value decides.
    gap = 1.0 if rank == len(s) else (s[rank - 1] ** 2 - s[rank] ** 2) / s[0] ** 2
    limit = 40 * max(shape) * EPS / gap * float(np.linalg.norm(delta))
    assert limit < 1e-6 * np.linalg.norm(published)
    assert np.linalg.norm(b @ a - published) < limit


def test_scales_of_activations_are_those_of_the_papers() -> None:
    magnitudes = np.array([0.25, 1.0, 4.0, 0.0])
    np.testing.assert_array_equal(activation_scale(magnitudes, 0.5), [0.5, 1, 2, 0])
    np.testing.assert_array_equal(activation_scale(magnitudes, 1), magnitudes)
    scale = lqer_scale(magnitudes)
    np.testing.assert_array_equal(scale, magnitudes / np.sqrt(0.25 * 4))
    assert scale[:3].min() * scale[:3].max() == 1
    assert not lqer_scale(np.zeros(3)).any()
    assert np.isfinite(lqer_scale(np.array([1e-200, 1e200]))).all()


def test_a_common_factor_of_the_scale_cancels() -> None:
    rng = np.random.default_rng(9)
    delta, scale = rng.standard_normal((12, 20)), rng.random(20)
    b, a = scaled_factors(delta, scale, 4)
    # Powers of two scale without rounding.
    for one, other in zip((b, a), scaled_factors(delta, 1024 * scale, 4), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_factors_share_the_singular_values_out_as_zeroquant_v2_does(
    shape: tuple[int, int],
) -> None:
    delta = np.random.default_rng(10).standard_normal(shape)
    rank = max(1, min(shape) // 2)
    b, a = svd_factors(delta, rank)
    shared = np.diag(np.linalg.svd(delta, compute_uv=False)[:rank])
    limit = 40 * max(shape) * EPS * float(shared[0, 0])
    # U and V are orthonormal: what is left of both squares is Sigma.
    np.testing.assert_allclose(b.T @ b, shared, atol=limit)
    np.testing.assert_allclose(a @ a.T, shared, atol=limit)


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_two_stages_in_one_metric_are_one(shape: tuple[int, int], kind: str) -> None:
    rng = np.random.default_rng(11)
    delta = rng.standard_normal(shape)
    gram = make_gram(kind, shape[1], rng)
    first_b, first_a = eora_factors(delta, gram, 5)
    second_b, second_a = eora_factors(delta - first_b @ first_a, gram, 7)
    left = weighted_norm(delta - first_b @ first_a - second_b @ second_a, gram) ** 2
    limit = 80 * max(shape) * EPS * weighted_norm(delta, gram) ** 2
    assert left == pytest.approx(tail(delta, gram, 12), abs=limit)


def test_two_stages_in_different_metrics_are_not_one() -> None:
    rng = np.random.default_rng(12)
    delta = rng.standard_normal((24, 40))
    gram = make_gram("full", 40, rng)
    first_b, first_a = svd_factors(delta, 5)
    second_b, second_a = eora_factors(delta - first_b @ first_a, gram, 7)
    left = weighted_norm(delta - first_b @ first_a - second_b @ second_a, gram) ** 2
    assert left > 1.05 * tail(delta, gram, 12)
    assert left < tail(delta, gram, 7)


@pytest.mark.parametrize("kept", [1, 6, 40, 99])
def test_the_top_of_a_gram_is_the_metric_of_a_truncated_inverse(kept: int) -> None:
    rng = np.random.default_rng(13)
    delta = rng.standard_normal((24, 40))
    gram = make_gram("full", 40, rng)
    top = top_of_gram(gram, kept)
    values, vectors = np.linalg.eigh(gram)
    t = min(kept, 40)
    q, spectrum = vectors[:, -t:], values[-t:]
    scale = float(values[-1])
    np.testing.assert_allclose(top, (q * spectrum) @ q.T, atol=40 * 40 * EPS * scale)
    # Eq. 5-7 of the paper with the inverse on these eigenvectors alone ...
    rank = min(4, t)
    u, s, vt = np.linalg.svd(delta @ (q * np.sqrt(spectrum)), full_matrices=False)
    truncated = (u[:, :rank] * s[:rank]) @ (vt[:rank] / np.sqrt(spectrum)) @ q.T
    # ... leaves in that metric what the form without an inverse leaves, and no less in any other.
    b, a = eora_factors(delta, top, rank)
    whole = weighted_norm(delta, gram) ** 2
    limit = 1e2 * 40**2 * EPS * whole
    ours, theirs = (weighted_norm(delta - p, top) ** 2 for p in (b @ a, truncated))
    assert ours == pytest.approx(theirs, abs=limit)
    ours, theirs = (weighted_norm(delta - p, gram) ** 2 for p in (b @ a, truncated))
    assert ours <= theirs + limit
    if t < 20:
        assert ours < 0.99 * theirs


def test_energy_rank_counts_from_both_ends() -> None:
    energies = np.array([8.0, 4.0, 2.0, 1.0])
    total = 16.0
    shares = {1.0: 0, 0.51: 1, 0.5: 1, 0.49: 2, 0.125: 3, 0.0625: 4, 0.01: 4, 0.0: 4}
    for share, rank in shares.items():
        assert energy_rank(energies, total, share) == rank
    assert energy_rank(energies, 15.0, 0.0) == 4
    assert energy_rank(np.zeros(3), 0.0, 0.0) == 0
    assert energy_rank(np.zeros(0), 5.0, 0.1) == 0
    single = (np.array([0.1, 0.1, 0.1]) / 3).astype(np.float32)
    assert energy_rank(single[:2], float(single[:2].sum()), 0.0) == 2
    # A norm that rounding has made larger than the sum of all there is.
    alone = np.array([1.0, 0.5, 0.0, 0.0], np.float32)
    assert energy_rank(alone, 1.5 * (1 + 1e-7), 0.0) == 2
