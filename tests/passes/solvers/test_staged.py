"""Stages of truncated SVDs: their sum is a projection, and equals one SVD in one metric."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.solvers.staged import Stage, staged_factors

Float = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)


def problem(shape: tuple[int, int], seed: int = 0) -> tuple[Float, Float]:
    """A weight, and a root of correlated inputs whose energies span four decades."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal(shape)
    mixing = rng.standard_normal((shape[1], shape[1]))
    return weight, mixing * np.geomspace(10, 0.1, shape[1])


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (31, 31)])
@pytest.mark.parametrize("weighted", [False, True])
def test_stages_in_one_metric_equal_one_svd_of_their_ranks_sum(
    shape: tuple[int, int], weighted: bool
) -> None:
    weight, root = problem(shape)
    metric = root if weighted else None
    u, v = staged_factors(weight, [Stage(5, metric), Stage(0, metric), Stage(7, metric)])
    once_u, once_v = staged_factors(weight, [Stage(12, metric)])
    np.testing.assert_allclose(u @ v, once_u @ once_v, rtol=0, atol=1e-9)
    # In different metrics it is another matrix: the comparison means something.
    other_u, other_v = staged_factors(weight, [Stage(5, root), Stage(7)])
    assert np.abs(other_u @ other_v - once_u @ once_v).max() > 0.1


def test_the_whole_is_an_orthogonal_projection_of_the_weight() -> None:
    weight, root = problem((24, 40))
    diagonal = np.geomspace(5, 0.2, 40)
    u, v = staged_factors(weight, [Stage(4, root), Stage(3), Stage(2, diagonal)])
    basis = np.linalg.qr(u)[0]
    np.testing.assert_allclose(u @ v, basis @ (basis.T @ weight), rtol=0, atol=1e3 * EPS)


def test_norms_are_shared_evenly_and_stages_keep_their_order() -> None:
    weight, root = problem((24, 40))
    u, v = staged_factors(weight, [Stage(4, root), Stage(3)])
    np.testing.assert_allclose(np.linalg.norm(u, axis=0), np.linalg.norm(v, axis=1), rtol=1e3 * EPS)
    first_u, first_v = staged_factors(weight, [Stage(4, root)])
    np.testing.assert_allclose(u[:, :4], first_u, rtol=0, atol=1e3 * EPS)
    np.testing.assert_allclose(v[:4], first_v, rtol=0, atol=1e3 * EPS)


def test_a_metric_of_few_directions_leaves_the_rest_of_its_rank_to_the_plain_svd() -> None:
    weight, _ = problem((24, 40))
    inputs = np.random.default_rng(1).standard_normal((40, 3))
    u, v = staged_factors(weight, [Stage(8, inputs)])
    split_u, split_v = staged_factors(weight, [Stage(3, inputs), Stage(5)])
    np.testing.assert_allclose(u @ v, split_u @ split_v, rtol=0, atol=1e-9)
    # All that these inputs tell apart is kept.
    assert np.abs((weight - u @ v) @ inputs).max() < 1e-9


def test_rounding_of_a_singular_gram_is_no_direction() -> None:
    """Roots of a Gram are square: what its tokens leave open is there as rounding."""
    weight, _ = problem((24, 40))
    inputs = np.random.default_rng(1).standard_normal((40, 3))
    gram: Float = inputs @ inputs.T
    values, vectors = np.linalg.eigh(gram)
    roots = [vectors * np.sqrt(values.clip(min=0)), vectors * np.sqrt(np.abs(values))]
    split_u, split_v = staged_factors(weight, [Stage(3, inputs), Stage(5)])
    for root in roots:
        u, v = staged_factors(weight, [Stage(8, root)])
        np.testing.assert_allclose(u @ v, split_u @ split_v, rtol=0, atol=1e-9)
    assert np.linalg.norm(roots[1]) > np.linalg.norm(inputs) * (1 + EPS), "there is some"


def test_a_residual_that_its_metric_cannot_see_goes_to_the_plain_svd() -> None:
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((12, 12))
    # Eight inputs carry everything: of the last direction the metric sees rounding only.
    root = np.diag(np.r_[np.geomspace(1e3, 1, 8), np.zeros(4)])
    u, v = staged_factors(weight, [Stage(11, root), Stage(1, root)])
    # All directions: nothing may be left, though the last one is seen by no input.
    np.testing.assert_allclose(u @ v, weight, rtol=0, atol=1e3 * 12 * EPS)
    assert np.abs(weight).max() > 0.1


def test_an_input_that_is_always_zero_is_no_special_case() -> None:
    weight, root = problem((24, 40))
    root[::3] = 0
    u, v = staged_factors(weight, [Stage(6, root), Stage(4)])
    assert np.isfinite(u).all()
    assert np.isfinite(v).all()


def test_a_weight_of_zeros_has_factors_of_zeros() -> None:
    u, v = staged_factors(np.zeros((5, 7)), [Stage(2, np.ones(7)), Stage(1)])
    assert u.shape == (5, 3)
    assert not u.any()
    assert not v.any()


def test_no_stage_leaves_an_empty_product() -> None:
    u, v = staged_factors(np.ones((3, 4)), [Stage(0)])
    assert (u.shape, v.shape) == ((3, 0), (0, 4))


@pytest.mark.parametrize("ranks", [(3, 2), (-1, 2)])
def test_ranks_beyond_the_weight_are_refused(ranks: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"are outside 0\.\.4 of \[4, 6\]"):
        staged_factors(np.ones((4, 6)), [Stage(rank) for rank in ranks])
