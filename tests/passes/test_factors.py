"""The closed forms against Eckart-Young in the weighted norm and the paper's own formula."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.factors import (
    eora_factors,
    gram_root,
    svd_factors,
    to_float16,
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
