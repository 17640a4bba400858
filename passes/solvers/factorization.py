"""Published factorisations of a weight, ``W ~ u v``, as pure functions on arrays.

Orientation: ``W [N, K]``, ``y = W x``, Gram ``H = sum x x^T``, ``u [N, r]``, ``v [r, K]``. All but
:func:`saes_factors` project the weight (:mod:`eoracc.passes.solvers.staged`); that one projects a
target beside it.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from eoracc.passes.solvers.factors import activation_scale
from eoracc.passes.solvers.singular import top_left_vectors
from eoracc.passes.solvers.staged import Stage, staged_factors

__all__ = [
    "NESTED_SHARE",
    "activation_scaled_factors",
    "alignment_weight",
    "factorized_rank",
    "nested_factors",
    "plain_factors",
    "saes_factors",
    "spectral_root",
    "truncation_loss",
    "whitened_factors",
]

Float = NDArray[np.float64]

NESTED_SHARE: Final = 0.95
"""``k1 / k`` of NSVD's main experiments."""

_ROUNDING: Final = 1e-9
"""The most that rounding takes from a rank that is a whole number."""


def factorized_rank(out_features: int, in_features: int, ratio: float) -> int:
    """The rank at which two factors hold ``1 - ratio`` of a weight's parameters, at least 1.

    ``r = floor((1 - ratio) N K / (N + K))``, of the exact product.

    >>> factorized_rank(576, 1536, 0.2), factorized_rank(640, 640, 0.8), factorized_rank(4, 4, 0.99)
    (335, 64, 1)
    """
    effective = out_features * in_features / (out_features + in_features)
    return max(1, int((1 - ratio) * effective + _ROUNDING))


def plain_factors(weight: NDArray[np.floating], rank: int) -> tuple[Float, Float]:
    """The truncated SVD: least ``||W - u v||_F`` (Eckart and Young).

    Args:
      weight: ``[N, K]``.
      rank: in ``0..min(N, K)``.

    Returns:
      ``u [N, r] = U_r sqrt(Sigma_r)`` and ``v [r, K] = sqrt(Sigma_r) V_r^T``.

    >>> u, v = plain_factors(np.diag([4.0, 1.0]), 1)
    >>> (u @ v).round(12).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    return staged_factors(weight, [Stage(rank)])


def activation_scaled_factors(
    weight: NDArray[np.floating], magnitudes: NDArray[np.floating], rank: int, *, alpha: float = 0.5
) -> tuple[Float, Float]:
    """ASVD: the truncated SVD of ``W S`` with ``S = diag(mean |x_i|)^alpha``.

    Args:
      weight: ``[N, K]``.
      magnitudes: ``mean |x_i|`` over calibration tokens, ``[K]``.
      rank: in ``0..min(N, K)``.
      alpha: 0 is the plain SVD; 0.5 in the paper.

    Source: Yuan et al., ASVD, arXiv:2312.05821, eq. 5-7: ``W = (U_r Sigma_r) (V_r^T S^-1)``. Here
    ``S`` is not inverted (:mod:`eoracc.passes.solvers.staged`), so that a dead input needs no
    floor.

    >>> u, v = activation_scaled_factors(np.diag([3.0, 2.0]), np.array([1.0, 4.0]), 1, alpha=1)
    >>> (u @ v).round(12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    return staged_factors(weight, [Stage(rank, activation_scale(magnitudes, alpha))])


def whitened_factors(weight: NDArray[np.floating], root: Float, rank: int) -> tuple[Float, Float]:
    """The truncated SVD of ``W S``, ``S S^T = H``: least output error ``||(W - u v) X||_F``.

    Args:
      weight: ``[N, K]``.
      root: ``S``, ``float64 [K, K]``: :func:`~eoracc.passes.solvers.factors.gram_root` is
      SVD-LLM's, by
        Cholesky, :func:`spectral_root` that of SVD-LLM V2. Any root gives the same product.
      rank: in ``0..min(N, K)``.

    Source: Wang et al., SVD-LLM, arXiv:2403.07378, section 3.1, and SVD-LLM V2, arXiv:2503.12340,
    algorithm 2: ``u v = U_r Sigma_r V_r^T S^-1``. With ``W S = U Sigma V^T`` that is
    ``U_r U_r^T W``: no inverse is taken.

    >>> u, v = whitened_factors(np.diag([3.0, 2.0]), np.diag([1.0, 4.0]), 1)
    >>> (u @ v).round(12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    return staged_factors(weight, [Stage(rank, root)])


def spectral_root(gram: Float) -> Float:
    """The root ``S = U_s sqrt(S_s)`` of a Gram ``H = U_s S_s U_s^T``, ``float64 [K, K]``.

    Source: Wang et al., SVD-LLM V2, arXiv:2503.12340, algorithm 2, which takes it in place of the
    Cholesky factor because it exists for singular Grams too. Eigenvalues that rounding made
    negative count as zero.

    >>> root = spectral_root(np.diag([4.0, 0.0]))
    >>> (root @ root.T).round(6).tolist()
    [[4.0, 0.0], [0.0, 0.0]]
    """
    values, vectors = scipy.linalg.eigh(gram)
    return np.asarray(vectors * np.sqrt(values.clip(min=0)), np.float64)


def truncation_loss(weight: NDArray[np.floating], root: Float, rank: int) -> float:
    """The least output error that a rank leaves, ``sqrt(sum_{i > r} sigma_i(W S)^2)``.

    Args:
      weight: ``[N, K]``.
      root: ``S``, ``float64 [K, K]``, ``S S^T = H``.
      rank: in ``0..min(N, K)``.

    Source: SVD-LLM V2, arXiv:2503.12340, section 3.1, ``L_min = ||C - C'||_F`` with ``C = W X``.

    >>> truncation_loss(np.diag([3.0, 2.0, 1.0]), np.eye(3), 1).__round__(12)
    2.2360679775
    """
    weighted = np.asarray(weight, np.float64) @ root
    wide = weighted if weighted.shape[0] <= weighted.shape[1] else weighted.T
    energies = scipy.linalg.eigvalsh(wide @ wide.T).clip(min=0)
    return float(np.sqrt(energies[: len(energies) - rank].sum()))


def nested_factors(
    weight: NDArray[np.floating], root: Float, rank: int, *, share: float = NESTED_SHARE
) -> tuple[Float, Float]:
    """NSVD: ``k1 = share * rank`` directions by activations, the rest by the plain SVD of the rest.

    Args:
      weight: ``[N, K]``.
      root: ``S``, ``float64 [K, K]``, ``S S^T = H``; by Cholesky the paper's NSVD-I, spectral its
        NSVD-II.
      rank: in ``0..min(N, K)``.
      share: ``k1 / k`` in 0..1; 1 is SVD-LLM, 0 the plain SVD.

    Source: Lu et al., arXiv:2503.17101, section 3.

    >>> u, v = nested_factors(np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 1.0, 9.0]), 2, share=0.5)
    >>> (u @ v).round(12).diagonal().tolist()
    [3.0, 0.0, 1.0]
    """
    first = round(share * rank)
    return staged_factors(weight, [Stage(first, root), Stage(rank - first)])


def saes_factors(
    weight: NDArray[np.floating],
    drift: NDArray[np.floating],
    root: Float,
    rank: int,
    *,
    beta: float | None = None,
) -> tuple[Float, Float, float]:
    """SAES-SVD: the best factors of a target between ``W`` and what undoes the prefix's errors.

    With ``X^f`` the layer's input in the original model and ``X`` behind the compressed prefix,
    ``H = X X^T`` and ``Delta = (X^f - X) X^T``, it minimises

        ``||u v X - W X||^2 + a ||u v X - W X^f||^2``, ``beta = a / (1 + a)``,

    which is ``||u v H^1/2 - W (H + beta Delta) H^-1/2||^2`` (eq. 10): the truncated SVD of
    ``G(beta) = (W + beta W Delta H^-1) S``, projected back without an inverse of ``S``.

    Args:
      weight: ``W``, ``[N, K]``.
      drift: ``W Delta H^-1``, ``[N, K]``: what matching the original's outputs adds to the weight
        (with a ridge in the inverse, see :func:`~eoracc.passes.solvers.gram.output_matching`).
      root: ``S``, ``float64 [K, K]``, ``S S^T = H``.
      rank: in ``0..min(N, K)``.
      beta: in 0..1; None takes :func:`alignment_weight`.

    Returns:
      ``u [N, r]``, ``v [r, K]`` and ``beta``.

    Source: Hu et al., SAES-SVD, arXiv:2602.03051, eq. 3-12.
    """
    weight, drift = np.asarray(weight, np.float64), np.asarray(drift, np.float64)
    if beta is None:
        beta = alignment_weight(weight @ root, drift @ root, rank)
    u, v = staged_factors(weight + beta * drift, [Stage(rank, root)])
    return u, v, beta


def alignment_weight(signal: Float, drift: Float, rank: int) -> float:
    """The ``beta`` in 0..1 for which truncation loses the least share of ``S + beta D``.

    With the singular subspaces ``U_r``, ``V_r`` held at those of ``S``, the share is a ratio of two
    quadratics in ``beta``,

        ``rho(beta) = ||P_L (S + beta D) P_R||^2 / ||S + beta D||^2``,
        ``P_L = I - U_r U_r^T``, ``P_R = I - V_r V_r^T``,

    whose stationary points solve ``(cB - bC) beta^2 + (cA - aC) beta + (bA - aB) = 0``; of those
    within 0..1 and of both ends the one with the least share is taken.

    Args:
      signal: ``S = W H^1/2``, ``[N, K]``.
      drift: ``D = W Delta H^-1/2``, ``[N, K]``.
      rank: in ``0..min(N, K)``.

    Source: SAES-SVD, arXiv:2602.03051, theorem 4.2 and eq. 16-19 (ACES).

    >>> alignment_weight(np.diag([2.0, 1.0]), np.diag([0.0, -1.0]), 1)
    1.0
    """
    basis = top_left_vectors(signal, rank)
    right = np.linalg.qr(signal.T @ basis)[0]

    def outside(matrix: Float) -> Float:
        matrix = matrix - basis @ (basis.T @ matrix)
        both: Float = matrix - (matrix @ right) @ right.T
        return both

    left_signal, left_drift = outside(signal), outside(drift)
    lost = np.array(
        [
            np.vdot(left_signal, left_signal),
            np.vdot(left_signal, left_drift),
            np.vdot(left_drift, left_drift),
        ]
    )
    whole = np.array([np.vdot(signal, signal), np.vdot(signal, drift), np.vdot(drift, drift)])

    def share(beta: float) -> float:
        powers = np.array([1.0, 2 * beta, beta * beta])
        total = float(whole @ powers)
        return float(lost @ powers) / total if total > 0 else 0.0

    (a, b, c), (big_a, big_b, big_c) = lost, whole
    roots = np.roots([c * big_b - b * big_c, c * big_a - a * big_c, b * big_a - a * big_b])
    inside = [float(root.real) for root in roots if root.imag == 0 and 0 < root.real < 1]
    # Ends first: of equal shares the least departure from the weight is taken.
    return min([0.0, 1.0, *inside], key=share)
