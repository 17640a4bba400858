"""The family of factorisations: what holds for all of them, and what each is the best at."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from eoracc.passes.solvers.factorization import (
    activation_scaled_factors,
    alignment_weight,
    factorized_rank,
    nested_factors,
    plain_factors,
    saes_factors,
    spectral_root,
    truncation_loss,
    whitened_factors,
)
from eoracc.passes.solvers.factors import gram_root
from eoracc.passes.solvers.residual_compensation import (
    adaptive_residual_rank,
    erc_factors,
    residual_rank,
)

Float = NDArray[np.float64]
Solve = Callable[["Problem", int], tuple[Float, Float]]

EPS = float(np.finfo(np.float64).eps)
SHAPES = [(24, 40), (40, 24), (31, 31), (1, 9), (9, 1)]
GRAMS = ["full", "singular", "one token", "dead columns"]


class Problem:
    """A weight with its inputs behind a compressed prefix, ``x``, and in the original, ``x_f``."""

    def __init__(self, shape: tuple[int, int], kind: str = "full", seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        width = shape[1]
        tokens = {"singular": max(1, width // 2), "one token": 1}.get(kind, 4 * width)
        self.weight = rng.standard_normal(shape)
        self.x = np.geomspace(10, 0.1, width)[:, None] * rng.standard_normal((width, tokens))
        self.x = rng.standard_normal((width, width)) @ self.x
        if kind == "dead columns":
            self.x[1::3] = 0
        self.x_f = self.x * (1 + 0.3 * rng.standard_normal(self.x.shape))
        self.gram: Float = self.x @ self.x.T
        self.root = gram_root(self.gram)
        self.magnitudes: Float = np.abs(self.x).mean(axis=1)
        self.drift: Float = self.weight @ (self.x_f - self.x) @ np.linalg.pinv(self.x)

    def lost(self, u: Float, v: Float) -> float:
        """``||(W - u v) X||^2``."""
        return float(np.linalg.norm((self.weight - u @ v) @ self.x) ** 2)


def solve_saes(problem: Problem, rank: int) -> tuple[Float, Float]:
    u, v, _ = saes_factors(problem.weight, 0 * problem.drift, problem.root, rank)
    return u, v


def solve_erc(problem: Problem, rank: int, **options: object) -> tuple[Float, Float]:
    residual = residual_rank(0.1, rank, *problem.weight.shape)
    return erc_factors(problem.weight, problem.root, rank, residual, **options)  # type: ignore[arg-type]


METHODS: dict[str, Solve] = {
    "factorize_svd": lambda p, r: plain_factors(p.weight, r),
    "factorize_activation_scaled": lambda p, r: activation_scaled_factors(
        p.weight, p.magnitudes, r
    ),
    "svd_llm": lambda p, r: whitened_factors(p.weight, p.root, r),
    "svd_llm_v2": lambda p, r: whitened_factors(p.weight, spectral_root(p.gram), r),
    "nsvd": lambda p, r: nested_factors(p.weight, p.root, r, share=0.8),
    "saes_svd": solve_saes,
    "erc_svd": solve_erc,
    "erc_svd, residual by activations": partial(solve_erc, metric="activation"),
    "erc_svd, three stages": partial(solve_erc, stages=3),
}
"""Each as a projection of the weight; SAES-SVD with a prefix that has lost nothing."""

BEST_IN: dict[str, Callable[[Problem], Float]] = {
    "factorize_svd": lambda p: np.eye(p.weight.shape[1]),
    "factorize_activation_scaled": lambda p: np.diag(np.sqrt(p.magnitudes)),
    "svd_llm": lambda p: p.x,
    "svd_llm_v2": lambda p: p.x,
    "saes_svd": lambda p: p.x,
    "erc_svd, residual by activations": lambda p: p.x,
}
"""The ``S`` of those that are optimal in one metric, ``min ||(W - u v) S||``."""


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_full_rank_gives_the_weight_and_every_rank_has_its_shape(
    method: str, shape: tuple[int, int], kind: str
) -> None:
    problem = Problem(shape, kind)
    whole = min(shape)
    for rank in sorted({1, whole // 2, whole} - {0}):
        u, v = METHODS[method](problem, rank)
        assert (u.shape, v.shape) == ((shape[0], rank), (rank, shape[1]))
        assert np.isfinite(u).all()
        assert np.isfinite(v).all()
    np.testing.assert_allclose(u @ v, problem.weight, rtol=0, atol=1e3 * whole * EPS)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_problem_has_the_same_factors(method: str) -> None:
    first, second = (METHODS[method](Problem((24, 40)), 7) for _ in range(2))
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("kind", GRAMS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", BEST_IN)
def test_the_error_in_its_metric_is_the_tail_of_the_singular_values(
    method: str, shape: tuple[int, int], kind: str
) -> None:
    problem = Problem(shape, kind)
    weighted = problem.weight @ BEST_IN[method](problem)
    singular = np.linalg.svd(weighted, compute_uv=False)
    whole = float((singular**2).sum())
    # Singular values come from their squares: a product of 40 terms, summed over 40 of them.
    limit = 40 * max(shape) * EPS * whole
    for rank in {1, min(shape) // 2, min(shape)} - {0}:
        u, v = METHODS[method](problem, rank)
        left = np.linalg.norm((problem.weight - u @ v) @ BEST_IN[method](problem)) ** 2
        assert left == pytest.approx(float((singular[rank:] ** 2).sum()), abs=limit)
    assert limit < 1e-9 * whole


@pytest.mark.parametrize("method", BEST_IN)
def test_no_other_product_of_the_rank_is_better_in_its_metric(method: str) -> None:
    problem, rng = Problem((24, 40)), np.random.default_rng(3)
    metric = BEST_IN[method](problem)
    u, v = METHODS[method](problem, 6)
    best = float(np.linalg.norm((problem.weight - u @ v) @ metric))
    for size in (1e-3, 1e-1, 1.0):
        for _ in range(5):
            other_u = u + size * rng.standard_normal(u.shape)
            # With the best second factor there is for it, found by least squares in the metric.
            fitted = np.linalg.lstsq(other_u, problem.weight @ metric, rcond=None)[0]
            assert np.linalg.norm(problem.weight @ metric - other_u @ fitted) > best


@pytest.mark.parametrize("kind", GRAMS)
def test_cholesky_and_eigenvectors_whiten_alike(kind: str) -> None:
    problem = Problem((24, 40), kind)
    known = np.linalg.matrix_rank(problem.weight @ problem.x)
    rank = min(9, int(known))
    cholesky = whitened_factors(problem.weight, problem.root, rank)
    spectral = whitened_factors(problem.weight, spectral_root(problem.gram), rank)
    scale = np.abs(problem.weight).max()
    np.testing.assert_allclose(
        cholesky[0] @ cholesky[1], spectral[0] @ spectral[1], rtol=0, atol=1e-9 * scale
    )


def test_the_whitened_svd_is_the_published_one_with_its_inverse() -> None:
    problem, rank = Problem((24, 40)), 7
    whitening = np.linalg.cholesky(problem.gram)
    left, singular, right = np.linalg.svd(problem.weight @ whitening, full_matrices=False)
    published = (left[:, :rank] * singular[:rank]) @ right[:rank] @ np.linalg.inv(whitening)
    u, v = whitened_factors(problem.weight, problem.root, rank)
    # The inverse amplifies rounding by the condition number of S; the projection does not.
    limit = float(np.linalg.cond(whitening)) * 40 * EPS * float(np.abs(problem.weight).max())
    np.testing.assert_allclose(u @ v, published, rtol=0, atol=limit)
    assert limit < 1e-9


def test_plain_factors_carry_the_roots_of_the_singular_values() -> None:
    problem = Problem((24, 40))
    u, v = plain_factors(problem.weight, 5)
    singular = np.linalg.svd(problem.weight, compute_uv=False)[:5]
    np.testing.assert_allclose((u**2).sum(axis=0), singular, rtol=1e-10)
    np.testing.assert_allclose((v**2).sum(axis=1), singular, rtol=1e-10)


def test_truncation_loss_is_what_the_whitened_svd_leaves() -> None:
    for shape in ((24, 40), (40, 24)):
        problem = Problem(shape)
        for rank in (0, 5, 24):
            u, v = whitened_factors(problem.weight, problem.root, rank)
            loss = truncation_loss(problem.weight, problem.root, rank)
            assert loss**2 == pytest.approx(
                problem.lost(u, v),
                abs=1e-12 * float(np.linalg.norm(problem.weight @ problem.x)) ** 2,
            )


@pytest.mark.parametrize(("share", "same"), [(1.0, "svd_llm"), (0.0, "factorize_svd")])
def test_nested_factors_span_from_plain_to_whitened(share: float, same: str) -> None:
    problem = Problem((24, 40))
    u, v = nested_factors(problem.weight, problem.root, 7, share=share)
    expected_u, expected_v = METHODS[same](problem, 7)
    np.testing.assert_allclose(u @ v, expected_u @ expected_v, rtol=0, atol=1e-9)


def test_the_share_of_a_rank_is_rounded_to_nearest() -> None:
    problem = Problem((24, 40))
    for rank, first in ((16, 15), (18, 17), (5, 5), (14, 13)):  # of 15.2, 17.1, 4.75, 13.3
        nested_u, nested_v = nested_factors(problem.weight, problem.root, rank)
        erc_u, erc_v = erc_factors(problem.weight, problem.root, rank, rank - first)
        np.testing.assert_array_equal(nested_u @ nested_v, erc_u @ erc_v)


def test_nested_and_residual_compensated_are_one_method_at_the_same_split() -> None:
    problem = Problem((24, 40))
    nested_u, nested_v = nested_factors(problem.weight, problem.root, 10, share=0.8)
    erc_u, erc_v = erc_factors(problem.weight, problem.root, 10, 2)
    np.testing.assert_array_equal(nested_u @ nested_v, erc_u @ erc_v)


class TestErc:
    """ERC-SVD's two stages."""

    def test_is_algorithm_one_with_its_inverse(self) -> None:
        problem, rank, residual = Problem((24, 40)), 9, 3
        whitening = np.linalg.cholesky(problem.gram)
        left, singular, right = np.linalg.svd(problem.weight @ whitening, full_matrices=False)
        kept = rank - residual
        first = (left[:, :kept] * singular[:kept]) @ right[:kept] @ np.linalg.inv(whitening)
        left, singular, right = np.linalg.svd(problem.weight - first, full_matrices=False)
        second = (left[:, :residual] * singular[:residual]) @ right[:residual]
        u, v = erc_factors(problem.weight, problem.root, rank, residual)
        np.testing.assert_allclose(u @ v, first + second, rtol=0, atol=1e-9)
        np.testing.assert_allclose(u[:, kept:] @ v[kept:], second, rtol=0, atol=1e-9)

    def test_the_residual_stage_trades_output_error_for_weight_error(self) -> None:
        problem = Problem((24, 40))
        outputs, weights = [], []
        for residual in range(0, 10, 3):
            u, v = erc_factors(problem.weight, problem.root, 9, residual)
            outputs.append(problem.lost(u, v))
            weights.append(float(np.linalg.norm(problem.weight - u @ v)))
        assert outputs == sorted(outputs)
        assert weights == sorted(weights, reverse=True)
        assert outputs[-1] > 1.1 * outputs[0]
        assert weights[-1] < 0.99 * weights[0]

    @pytest.mark.parametrize("options", [{"metric": "activation"}, {"stages": 1}])
    def test_one_metric_or_one_stage_is_svd_llm(self, options: dict[str, object]) -> None:
        problem = Problem((24, 40))
        u, v = erc_factors(problem.weight, problem.root, 9, 4, **options)  # type: ignore[arg-type]
        whole_u, whole_v = whitened_factors(problem.weight, problem.root, 9)
        np.testing.assert_allclose(u @ v, whole_u @ whole_v, rtol=0, atol=1e-9)

    def test_further_stages_take_turns(self) -> None:
        problem = Problem((24, 40))
        u, v = erc_factors(problem.weight, problem.root, 12, 5, stages=4)
        left = problem.weight
        for rank, metric in ((7, problem.x), (2, None), (2, problem.x), (1, None)):
            weighted = left if metric is None else left @ metric
            basis = np.linalg.svd(weighted, full_matrices=False)[0][:, :rank]
            left = left - basis @ (basis.T @ left)
        np.testing.assert_allclose(problem.weight - u @ v, left, rtol=0, atol=1e-9)

    @pytest.mark.parametrize(
        ("beta", "rank", "shape", "expected"),
        [
            (0.05, 230, (576, 576), 14),
            (0.05, 335, (576, 1536), 20),  # of 20.9
            (0.0, 9, (24, 40), 0),
            (1.0, 9, (24, 40), 9),
            (0.05, 1, (9, 1), 0),
        ],
    )
    def test_residual_rank(
        self, beta: float, rank: int, shape: tuple[int, int], expected: int
    ) -> None:
        assert residual_rank(beta, rank, *shape) == expected

    def test_the_adaptive_split_leaves_the_least_product_of_errors(self) -> None:
        problem = Problem((90, 120))
        chosen = adaptive_residual_rank(problem.weight, problem.root, 20)

        def product(residual: int) -> float:
            u, v = erc_factors(problem.weight, problem.root, 20, residual)
            return problem.lost(u, v) * float(np.linalg.norm(problem.weight - u @ v)) ** 2

        tried = [residual_rank(beta, 20, 90, 120) for beta in (0, 0.025, 0.05, 0.1, 0.2)]
        assert product(chosen) == min(map(product, tried))
        assert len(set(tried)) == 5

    @pytest.mark.parametrize(("least", "expected"), [(0.9, 0), (0.02, 10)])
    def test_the_adaptive_split_goes_by_what_directions_are_worth(
        self, least: float, expected: int
    ) -> None:
        """Half the inputs are hardly seen; the others need all of the rank, or little of it."""
        rng = np.random.default_rng(1)
        seen, unseen = np.geomspace(1, least, 20), np.geomspace(4, 0.5, 6)
        halves = [
            rng.standard_normal((90, len(scale))) * scale @ rng.standard_normal((len(scale), 60))
            for scale in (seen, unseen)
        ]
        weight = np.hstack(halves) + 0.01 * rng.standard_normal((90, 120))
        root = np.diag(np.repeat([1.0, 1e-3], 60))
        assert adaptive_residual_rank(weight, root, 20) == expected
        assert residual_rank(0.2, 20, 90, 120) == 10, "is the largest share"

    def test_the_adaptive_split_is_none_where_inputs_are_alike(self) -> None:
        problem = Problem((24, 40))
        assert adaptive_residual_rank(problem.weight, np.eye(40), 9) == 0


class TestSaes:
    """SAES-SVD's target and its weight."""

    def test_minimises_the_sum_of_local_and_accumulated_error(self) -> None:
        problem, rank, beta = Problem((24, 40)), 7, 0.4
        alpha = beta / (1 - beta)

        def objective(product: Float) -> float:
            local = np.linalg.norm(product @ problem.x - problem.weight @ problem.x) ** 2
            aligned = np.linalg.norm(product @ problem.x - problem.weight @ problem.x_f) ** 2
            return float(local + alpha * aligned)

        u, v, used = saes_factors(problem.weight, problem.drift, problem.root, rank, beta=beta)
        assert used == beta
        # An optimum of its own: both targets stacked are one, and the best product in X's span is
        # the truncated SVD of its projection on that span.
        target = (problem.weight @ problem.x + alpha * problem.weight @ problem.x_f) / (1 + alpha)
        rows = np.linalg.svd(problem.x, full_matrices=False)[2]
        left, singular, right = np.linalg.svd(target @ rows.T @ rows, full_matrices=False)
        best = (left[:, :rank] * singular[:rank]) @ right[:rank] @ np.linalg.pinv(problem.x)
        assert objective(u @ v) == pytest.approx(objective(best), rel=1e-9)
        assert objective(u @ v) < 0.999 * objective(_plain(problem, rank))

    def test_beta_minimises_the_share_that_truncation_loses(self) -> None:
        inside = 0
        for seed in range(20):
            rng = np.random.default_rng(seed)
            signal, drift = rng.standard_normal((2, 12, 16))
            drift -= 0.7 * signal
            left, _, right = np.linalg.svd(signal)
            outside_left = np.eye(12) - left[:, :3] @ left[:, :3].T
            outside_right = np.eye(16) - right[:3].T @ right[:3]
            betas = np.linspace(0, 1, 2001)
            shares = [
                np.linalg.norm(outside_left @ (signal + b * drift) @ outside_right) ** 2
                / np.linalg.norm(signal + b * drift) ** 2
                for b in betas
            ]
            found = alignment_weight(signal, drift, 3)
            # The grid is half a thousandth off at most, and the share flat at its minimum.
            assert found == pytest.approx(betas[int(np.argmin(shares))], abs=6e-4)
            inside += 0.001 < found < 0.999
        assert inside > 3

    def test_without_drift_the_weight_is_kept(self) -> None:
        assert alignment_weight(np.eye(4), np.zeros((4, 4)), 2) == 0.0
        assert alignment_weight(np.zeros((4, 4)), np.zeros((4, 4)), 2) == 0.0


def _plain(problem: Problem, rank: int) -> Float:
    u, v = plain_factors(problem.weight, rank)
    return u @ v


def test_the_rank_is_that_of_exact_arithmetic() -> None:
    """``1 - 0.8`` falls short of 0.2 in floats, and 320 times that of 64."""
    for rows, columns in [(640, 640), (576, 576), (40, 40), (2048, 640), (48, 88)]:
        for blocks, removed in itertools.product((1, 18, 30), range(1, 100)):
            for k in {1, blocks // 2, blocks} - {0}:
                ratio = Fraction(blocks * removed, 100 * k)
                if ratio >= 1:
                    continue
                exact = (1 - ratio) * Fraction(rows * columns, rows + columns)
                found = factorized_rank(rows, columns, blocks * (removed / 100) / k)
                assert found == max(1, int(exact))
    assert factorized_rank(640, 640, 0.8) == 64
