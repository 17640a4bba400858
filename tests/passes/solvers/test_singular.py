"""Top singular vectors against the full decomposition, over shapes, spectra and both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from eoracc.passes.solvers import singular
from eoracc.passes.solvers.singular import TOLERANCE, top_left_vectors

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHAPES = [(240, 240), (240, 300), (300, 240)]
SPECTRA = ["white", "decaying", "spiked", "few", "one", "none"]


@pytest.fixture
def by_krylov(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small matrices, the way of large ones."""
    monkeypatch.setattr(singular, "_EXACT_SIDE", 16)
    monkeypatch.setattr(singular, "_BLOCK", 8)


def make(shape: tuple[int, int], spectrum: str) -> NDArray[np.float64]:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal(shape)
    side = min(shape)
    if spectrum == "white":
        return matrix
    u, _, vt = np.linalg.svd(matrix, full_matrices=False)
    values = {
        "decaying": np.geomspace(1, 1e-4, side),
        "spiked": np.concatenate([[1e3], np.geomspace(1, 0.3, side - 1)]),
        "few": np.concatenate([np.geomspace(5, 1, 6), np.zeros(side - 6)]),
        "one": np.concatenate([[1.0], np.zeros(side - 1)]),
        "none": np.zeros(side),
    }[spectrum]
    product: NDArray[np.float64] = (u * values) @ vt
    return product


def left_over(matrix: NDArray[np.floating], vectors: NDArray[np.floating]) -> float:
    exact, basis = matrix.astype(np.float64), vectors.astype(np.float64)
    return float(np.linalg.norm(exact - basis @ (basis.T @ exact)))


def optimum(matrix: NDArray[np.floating], rank: int) -> float:
    singular_values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    return float(np.linalg.norm(singular_values[rank:]))


def rounding(matrix: NDArray[np.floating]) -> float:
    """Of the vectors themselves, each off by some roundings: how much of the whole leaks past."""
    norm = float(np.linalg.norm(matrix.astype(np.float64)))
    side: int = max(matrix.shape)
    return norm * 4 * side * float(np.finfo(matrix.dtype).eps)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_vectors_leave_the_tail(
    shape: tuple[int, int], spectrum: str, dtype: type[np.floating]
) -> None:
    matrix = make(shape, spectrum).astype(dtype)
    for rank in (0, 1, 8, min(shape)):
        vectors = top_left_vectors(matrix, rank)
        assert vectors.shape == (shape[0], rank)
        assert vectors.dtype == dtype
        assert_orthonormal(vectors)
        allowed = optimum(matrix, rank) * (1 + 4 * max(shape) * np.finfo(dtype).eps)
        assert left_over(matrix, vectors) <= allowed + rounding(matrix)


@pytest.mark.usefixtures("by_krylov")
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES)
def test_krylov_vectors_leave_the_tail_within_the_tolerance(
    shape: tuple[int, int], spectrum: str, dtype: type[np.floating]
) -> None:
    matrix = make(shape, spectrum).astype(dtype)
    for rank in (1, 8, 24):
        vectors = top_left_vectors(matrix, rank)
        assert vectors.shape == (shape[0], rank)
        assert vectors.dtype == dtype
        assert_orthonormal(vectors)
        # The tolerance is on an estimate: what is promised is five times as much.
        allowed = optimum(matrix, rank) * (1 + 5 * TOLERANCE)
        assert left_over(matrix, vectors) <= allowed + rounding(matrix)


def assert_orthonormal(vectors: NDArray[np.floating]) -> None:
    rows, rank = vectors.shape
    off = np.abs(vectors.T @ vectors - np.eye(rank)).max(initial=0.0)
    assert off <= 20 * rows * np.finfo(vectors.dtype).eps


@pytest.mark.parametrize("krylov", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("huge", [1e2, 1e4, 1e6])
def test_one_huge_direction_does_not_drown_the_others(
    huge: float, shape: tuple[int, int], krylov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32 its square leaves no digit to those that are a ten-thousandth of it."""
    if krylov:
        monkeypatch.setattr(singular, "_EXACT_SIDE", 16)
        monkeypatch.setattr(singular, "_BLOCK", 8)
    matrix = make(shape, "decaying")
    rng = np.random.default_rng(3)
    matrix += huge * np.outer(*(np.linalg.qr(rng.standard_normal((n, 1)))[0] for n in shape))
    single = matrix.astype(np.float32)
    vectors = top_left_vectors(single, 24)
    assert vectors.dtype == np.float32
    assert_orthonormal(vectors)
    left, least = left_over(single, vectors), optimum(single, 24)
    # Vectors as float32 holds them let a rounding of the largest through.
    assert left <= np.hypot(least * (1 + 5 * TOLERANCE), 10 * np.finfo(np.float32).eps * huge)
    assert left < 0.5 * optimum(single, 1), "the others are not drowned"


@pytest.mark.usefixtures("by_krylov")
def test_a_wrong_subspace_would_be_noticed() -> None:
    matrix = make((240, 240), "white")
    other = np.linalg.qr(np.random.default_rng(1).standard_normal((240, 8)))[0]
    allowed = optimum(matrix, 8) * (1 + 5 * TOLERANCE) + rounding(matrix)
    assert left_over(matrix, other) > 1.02 * allowed


@pytest.mark.usefixtures("by_krylov")
@pytest.mark.parametrize("shape", SHAPES)
def test_vectors_that_are_told_apart_are_the_singular_vectors_in_order(
    shape: tuple[int, int],
) -> None:
    matrix = make(shape, "few")
    vectors = top_left_vectors(matrix, 6)
    u = np.linalg.svd(matrix)[0][:, :6]
    cosines = np.abs(np.einsum("ij,ij->j", u, vectors))
    # Neighbours differ by a quarter, so that rounding turns a vector by a few roundings at most.
    np.testing.assert_allclose(cosines, 1, atol=100 * max(shape) * np.finfo(np.float64).eps)


def test_both_ways_agree_on_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = make((240, 300), "decaying")
    exact = left_over(matrix, top_left_vectors(matrix, 12))
    monkeypatch.setattr(singular, "_EXACT_SIDE", 16)
    monkeypatch.setattr(singular, "_BLOCK", 8)
    krylov = left_over(matrix, top_left_vectors(matrix, 12))
    assert exact < krylov <= exact * (1 + 5 * TOLERANCE)


@pytest.mark.usefixtures("by_krylov")
def test_a_space_that_does_not_settle_gives_way_to_the_exact_solution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrix = make((240, 240), "white")
    monkeypatch.setattr(singular, "TOLERANCE", 0.0)
    monkeypatch.setattr(singular, "_EXACT_SHARE", 1)
    vectors = top_left_vectors(matrix, 60)
    limit = optimum(matrix, 60) * (1 + 4 * 240 * np.finfo(np.float64).eps)
    assert left_over(matrix, vectors) <= limit


@pytest.mark.parametrize("side", [64, 1100])
def test_the_same_matrix_gives_the_same_vectors(side: int) -> None:
    matrix = np.random.default_rng(2).standard_normal((side, side)).astype(np.float32)
    np.testing.assert_array_equal(top_left_vectors(matrix, 8), top_left_vectors(matrix.copy(), 8))


def test_columns_have_their_largest_entry_positive() -> None:
    vectors = top_left_vectors(make((240, 300), "white"), 20)
    largest = np.abs(vectors).argmax(axis=0)
    assert (vectors[largest, np.arange(20)] > 0).all()
    turned = top_left_vectors(-make((240, 300), "white"), 20)
    np.testing.assert_array_equal(turned, vectors)
