"""Closed-form low-rank factors of a compression error, as pure functions on arrays.

Orientation: weights ``[out, in]``, ``y = W x``, error ``delta = W - W_hat``, Gram
``H = sum x x^T``, factors ``B [out, rank]`` and ``A [rank, in]`` with ``delta ~ B A`` as in PEFT.
The output error that ``delta`` causes on the calibration tokens is
``||delta X||_F = sqrt(tr(delta H delta^T))``.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from eoracc.passes.solvers.singular import top_left_vectors

__all__ = [
    "SUM_ROUNDOFF",
    "activation_scale",
    "balanced",
    "energy_rank",
    "eora_factors",
    "gram_root",
    "lqer_scale",
    "output_weighted_factors",
    "root_and_rank",
    "scaled_factors",
    "svd_factors",
    "to_float16",
    "top_of_gram",
    "weighted_norm",
]

SUM_ROUNDOFF: Final = 2.0**-24
"""Unit roundoff of float32, in which the products of a Gram are summed."""

Float = NDArray[np.float64]


def weighted_norm(delta: NDArray[np.floating], gram: Float) -> float:
    """The output error of ``delta`` over the tokens of ``gram``, ``sqrt(tr(delta H delta^T))``.

    Args:
      delta: ``[out, in]``.
      gram: ``float64 [in, in]``, symmetric positive semidefinite.

    >>> weighted_norm(np.array([[3.0, 0.0]]), np.diag([4.0, 1.0]))
    6.0
    """
    # Good errors lie where the Gram is small, far below its largest eigenvalue: in float32 the
    # products would cancel into noise.
    delta = np.asarray(delta, np.float64)
    return float(np.sqrt(max(0.0, np.vdot(delta @ gram, delta))))


def gram_root(gram: Float) -> Float:
    """A square root ``L`` of a Gram, ``H = L L^T``, ``float64 [in, in]``.

    The Cholesky factor where there is one; otherwise (a singular Gram) the eigenvectors scaled by
    the roots of their eigenvalues, with those that rounding made negative taken as zero.
    """
    return root_and_rank(gram)[0]


def root_and_rank(gram: Float) -> tuple[Float, int]:
    """The root of :func:`gram_root`, and the rank of ``gram`` as far as it shows on the way.

    The rank is full where there is a Cholesky factor. Otherwise it is the number of eigenvalues
    above ``K u max(eigenvalue)``, with the unit roundoff ``u`` of the sums that a Gram is made of.

    >>> root_and_rank(np.diag([4.0, 1.0]))[1], root_and_rank(np.diag([4.0, 0.0]))[1]
    (2, 1)
    """
    try:
        root: Float = np.asarray(np.linalg.cholesky(gram), np.float64)
        rank = len(gram)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        root = vectors * np.sqrt(np.maximum(values, 0))
        rank = int(np.sum(values > len(gram) * SUM_ROUNDOFF * values.max()))
    return root, rank


def eora_factors(
    delta: NDArray[np.floating],
    gram: Float,
    rank: int,
    *,
    weighted: NDArray[np.floating] | None = None,
) -> tuple[Float, Float]:
    """Low-rank factors that minimise the layer's output error.

    Args:
      delta: ``W - W_hat``, ``[out, in]``.
      gram: ``sum x x^T`` over calibration tokens, ``float64 [in, in]``, symmetric positive
        semidefinite, may be singular.
      rank: columns of ``B``, in ``0..min(out, in)``.
      weighted: ``delta @ gram_root(gram)``, for callers that have it already.

    Returns:
      ``B [out, rank]`` and ``A [rank, in]`` minimising ``||(delta - B A) X||_F``, balanced: the
      norm of each column of ``B`` equals that of its row of ``A``.

    Raises:
      ValueError: ``rank`` is out of range.

    Source: Liu et al., EoRA, arXiv:2410.21271, eq. 5-7, in an inverse-free form. The columns of
    ``B`` are the top left singular vectors of ``delta L``, ``H = L L^T``; they are orthonormal,
    hence ``A = B^T delta``, and no eigenvalue of ``H`` is ever divided by. The paper projects with
    ``Q sqrt(Lambda)`` and back with its inverse: the same product where ``H`` is regular.

    >>> b, a = eora_factors(np.diag([3.0, 2.0]), np.diag([1.0, 4.0]), 1)
    >>> np.round(b @ a, 12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    _check_rank(rank, delta)
    # In the precision of delta. Float32 is enough for a build: nothing cancels between here and the
    # factors, which are stored as float16.
    if weighted is None:
        weighted = delta @ gram_root(gram).astype(delta.dtype, copy=False)
    return _projected(delta, weighted, rank)


def output_weighted_factors(
    delta: NDArray[np.floating],
    gram: Float,
    output_root: NDArray[np.floating],
    rank: int,
    *,
    weighted: NDArray[np.floating] | None = None,
) -> tuple[Float, Float]:
    """Low-rank factors that minimise an output error whose directions do not count alike.

    With ``H = S S^T``, ``G = L L^T`` and ``E = delta - B A`` they minimise

        ``tr(G E H E^T) = ||L^T E S||_F^2``.

    Args:
      delta: ``W - W_hat``, ``[out, in]``.
      gram: ``H``, of the input: ``float64 [in, in]``, symmetric positive semidefinite, may be
        singular.
      output_root: ``L^T``, ``[out, out]``, of what errors of the output count for: any ``L`` with
        ``G = L L^T``, such as :func:`gram_root` gives.
      rank: columns of ``B``, in ``0..min(out, in)``.
      weighted: ``delta @ gram_root(gram)``, for callers that have it already.

    Returns:
      ``B [out, rank]`` and ``A [rank, in]``, balanced. The error left is the tail
      ``sum_{i > rank} sigma_i^2`` of the singular values of ``L^T delta S``. A pair whose singular
      value is zero is zero.

    Raises:
      ValueError: ``rank`` is out of range.

    Neither root is inverted. With ``U`` the top left singular vectors of ``M = L^T delta S``,

        ``A = U^T L^T delta``    and    ``B = delta S (A S)^+``,

    hence ``L^T B A S = M V V^T``, the best of that rank (Eckart and Young). For this ``A``, ``B``
    is the least-squares solution without any ``G``: **outputs' weights choose what of the input is
    corrected, not how**. Where ``G`` is singular, what the error does in its null space is free; of
    all minimisers this one leaves the least there too, for the rows of ``A`` that it has. Where
    ``G`` is a multiple of the identity the product is EoRA's.

    >>> delta, alike = np.diag([3.0, 2.0]), np.eye(2)
    >>> b, a = output_weighted_factors(delta, alike, np.diag([1.0, 2.0]), 1)
    >>> np.round(b @ a, 12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    _check_rank(rank, delta)
    if weighted is None:
        weighted = delta @ gram_root(gram).astype(delta.dtype, copy=False)
    left = output_root.astype(delta.dtype, copy=False)
    seen = left @ weighted
    basis = top_left_vectors(seen, rank)
    a = (basis.T @ left) @ delta
    return balanced(_solved_for(weighted, basis.T @ seen), a)


def svd_factors(delta: NDArray[np.floating], rank: int) -> tuple[Float, Float]:
    """The truncated SVD of ``delta``: the best factors where every input direction counts alike.

    With ``delta = U Sigma V^T`` they are ``B = U_r sqrt(Sigma_r)`` and ``A = sqrt(Sigma_r) V_r^T``,
    which is how Yao et al., ZeroQuant-V2, arXiv:2303.08302, share the singular values out.

    Args:
      delta: ``W - W_hat``, ``[out, in]``.
      rank: in ``0..min(out, in)``.

    Returns:
      ``B [out, rank]`` and ``A [rank, in]``, balanced.

    Raises:
      ValueError: ``rank`` is out of range.

    >>> b, a = svd_factors(np.diag([3.0, 2.0]), 1)
    >>> np.round(b @ a, 12).tolist()
    [[3.0, 0.0], [0.0, 0.0]]
    """
    _check_rank(rank, delta)
    return _projected(delta, delta, rank)


def scaled_factors(
    delta: NDArray[np.floating], scale: NDArray[np.floating], rank: int
) -> tuple[Float, Float]:
    """The factors that minimise ``||(delta - B A) S||_F`` for a diagonal ``S``.

    Args:
      delta: ``W - W_hat``, ``[out, in]``.
      scale: the diagonal, ``[in]``, nonnegative: what an error counts for by its column.
      rank: in ``0..min(out, in)``.

    Returns:
      ``B [out, rank]`` and ``A [rank, in]``, balanced.

    Raises:
      ValueError: ``rank`` is out of range.

    Source: with ``delta S = U Sigma V^T``, published as ``B A = U_r Sigma_r V_r^T S^-1`` (ASVD,
    arXiv:2312.05821; LQER, arXiv:2402.02446). ``U_r Sigma_r V_r^T`` is
    ``U_r U_r^T delta S``, so that the inverse cancels: ``B = U_r``, ``A = U_r^T delta``. A column
    whose scale is zero needs no floor then, which the published code gives it.

    >>> b, a = scaled_factors(np.diag([3.0, 2.0]), np.array([1.0, 4.0]), 1)
    >>> np.round(b @ a, 12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    _check_rank(rank, delta)
    return _projected(delta, delta * scale.astype(delta.dtype, copy=False), rank)


def activation_scale(magnitudes: NDArray[np.floating], alpha: float) -> Float:
    """The diagonal of ASVD, ``s_i = (mean |x_i|)^alpha``, ``float64 [in]``.

    Args:
      magnitudes: ``mean |x_i|`` over calibration tokens, ``[in]``.
      alpha: 0 weighs all columns alike, 1 by their activations; 0.5 in the paper.

    Source: Yuan et al., ASVD, arXiv:2312.05821. The published code adds 1e-6 to each mean.

    >>> activation_scale(np.array([4.0, 9.0]), 0.5).tolist()
    [2.0, 3.0]
    """
    return np.asarray(magnitudes, np.float64) ** alpha


def lqer_scale(magnitudes: NDArray[np.floating]) -> Float:
    """The diagonal of L2QER, ``s_i = a_i / sqrt(min a * max a)``, ``float64 [in]``.

    Args:
      magnitudes: ``a_i = mean |x_i|`` over calibration tokens, ``[in]``.

    Source: Zhang et al., LQER, arXiv:2402.02446. What all columns share cancels from the
    product ``B A``. Two things differ from the published code, which takes the largest of the means
    over single samples, so that its scale depends on how the text was cut, and raises it to 1e-4:
    here the mean is over all tokens, and the least magnitude is that of the columns that are not
    always zero.

    >>> lqer_scale(np.array([1.0, 4.0, 0.0])).tolist()
    [0.5, 2.0, 0.0]
    """
    magnitudes = np.asarray(magnitudes, np.float64)
    alive = magnitudes[magnitudes > 0]
    if not alive.size:
        return np.zeros_like(magnitudes)
    # The roots apart: their product may be beyond the range of floats.
    scale: Float = magnitudes / (np.sqrt(alive.min()) * np.sqrt(alive.max()))
    return scale


def top_of_gram(gram: Float, directions: int) -> Float:
    """The part of a Gram on its top eigenspace, ``Q_t Lambda_t Q_t^T``, ``float64 [in, in]``.

    EoRA's inverse, truncated to that eigenspace, gives ``A = B^T delta Q_t Q_t^T``. In the metric
    of the truncated Gram that leaves the same error as ``A = B^T delta``, which leaves less (or as
    much) in every other: so truncate the Gram and solve without an inverse.

    Args:
      gram: symmetric positive semidefinite, ``float64 [in, in]``.
      directions: ``t``, eigenvectors that are kept; all where there are no more.

    >>> top_of_gram(np.diag([1.0, 4.0]), 1).round(12).tolist()
    [[0.0, 0.0], [0.0, 4.0]]
    """
    side = len(gram)
    kept = min(directions, side)
    values, vectors = scipy.linalg.eigh(gram, subset_by_index=(side - kept, side - 1))
    return np.asarray((vectors * values.clip(min=0)) @ vectors.T, np.float64)


def energy_rank(energies: NDArray[np.floating], total: float, share: float) -> int:
    """The smallest rank that leaves at most ``share`` of an error's energy.

    ``r = min { r : total - sum_{i <= r} sigma_i^2 <= share * total }``, and the number of
    ``energies`` where all of them are not enough. The solution of rank ``r`` is the first ``r``
    columns of ``B`` and rows of ``A`` of any larger one.

    Args:
      energies: ``sigma_i^2 [rank]``, squared singular values of the weighted error, largest first.
      total: their sum over all of them, ``||delta L||_F^2``.
      share: in 0..1.

    >>> [energy_rank(np.array([9.0, 4.0, 1.0]), 14.0, share) for share in (0.0, 0.1, 0.4, 1.0)]
    [3, 2, 1, 0]
    """
    tails = total - np.concatenate([[0.0], np.cumsum(energies, dtype=np.float64)])
    # A tail of nothing but rounding is one within any share.
    rounding = len(tails) * float(np.finfo(energies.dtype).eps) * total
    enough = tails <= share * total + rounding
    return int(enough.argmax()) if enough.any() else len(energies)


def to_float16(factor: Float) -> NDArray[np.float16]:
    """``factor`` as it is stored; a value beyond float16 becomes the largest finite one."""
    limit = float(np.finfo(np.float16).max)
    return np.clip(factor, -limit, limit).astype(np.float16)


def balanced(b: NDArray[Any], a: NDArray[Any]) -> tuple[Float, Float]:
    """The same product with equal norms on both sides, so that float16 fits both alike."""
    left = np.linalg.norm(b, axis=0)
    right = np.linalg.norm(a, axis=1)
    used = (left > 0) & (right > 0)
    scale = np.sqrt(np.divide(right, left, out=np.zeros_like(left), where=used))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=used)
    return b * scale, a * inverse[:, None]


def _solved_for(target: NDArray[np.floating], rows: NDArray[np.floating]) -> Float:
    """``B`` that minimises ``||target - B rows||_F``, of least norm; ``rows`` are near orthogonal.

    By the normal equations, in float64: their condition is the square of the ratio of the rows'
    norms, which are singular values that were worth keeping.
    """
    rows = np.asarray(rows, np.float64)
    inner = np.linalg.pinv(rows @ rows.T, rcond=1e-13, hermitian=True)
    solved: Float = (target @ rows.T) @ inner
    return solved


def _check_rank(rank: int, delta: NDArray[np.floating]) -> None:
    rows, columns = delta.shape
    if not 0 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} is outside 0..{min(rows, columns)} of [{rows}, {columns}]")


def _projected(
    delta: NDArray[np.floating], weighted: NDArray[np.floating], rank: int
) -> tuple[Float, Float]:
    """``delta`` projected on the top left singular vectors of ``weighted``, ``delta`` in a metric.

    With ``B`` orthonormal ``A = B^T delta`` is the best in every metric, and of all ``B`` these
    vectors are the best in this one (Eckart and Young).
    """
    basis = top_left_vectors(weighted, rank)
    return balanced(basis, basis.T @ delta)
