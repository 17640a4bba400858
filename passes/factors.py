"""Closed-form low-rank factors of a compression error, as pure functions on arrays.

Orientation: weights ``[out, in]``, ``y = W x``, error ``delta = W - W_hat``, Gram
``H = sum x x^T``, factors ``B [out, rank]`` and ``A [rank, in]`` with ``delta ~ B A`` as in PEFT.
The output error that ``delta`` causes on the calibration tokens is
``||delta X||_F = sqrt(tr(delta H delta^T))``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["eora_factors", "gram_root", "svd_factors", "to_float16", "weighted_norm"]

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
    try:
        root: Float = np.asarray(np.linalg.cholesky(gram), np.float64)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(gram)
        root = vectors * np.sqrt(np.maximum(values, 0))
    return root


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
    hence ``A = B^T delta``, and no eigenvalue of ``H`` is ever divided by. They come from one
    eigendecomposition of the smaller side.

    >>> b, a = eora_factors(np.diag([3.0, 2.0]), np.diag([1.0, 4.0]), 1)
    >>> np.round(b @ a, 12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    rows, columns = delta.shape
    _check_rank(rank, rows, columns)
    # In the precision of delta. Float32 is enough for a build: nothing cancels between here and the
    # factors, which are stored as float16.
    if weighted is None:
        weighted = delta @ gram_root(gram).astype(delta.dtype, copy=False)
    if rows <= columns:
        basis = _top_eigenvectors(weighted @ weighted.T, rank)
    else:
        # These columns are the basis times the singular values; QR only normalises them.
        basis = np.linalg.qr(weighted @ _top_eigenvectors(weighted.T @ weighted, rank))[0]
    return _balanced(basis, basis.T @ delta)


def svd_factors(delta: NDArray[np.floating], rank: int) -> tuple[Float, Float]:
    """The truncated SVD of ``delta``: the best factors where every input direction counts alike.

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
    rows, columns = delta.shape
    _check_rank(rank, rows, columns)
    delta = np.asarray(delta, np.float64)
    if rows <= columns:
        basis = _top_eigenvectors(delta @ delta.T, rank)
        return _balanced(basis, basis.T @ delta)
    basis = _top_eigenvectors(delta.T @ delta, rank)
    return _balanced(delta @ basis, basis.T)


def to_float16(factor: Float) -> NDArray[np.float16]:
    """``factor`` as it is stored; a value beyond float16 becomes the largest finite one."""
    limit = float(np.finfo(np.float16).max)
    return np.clip(factor, -limit, limit).astype(np.float16)


def _check_rank(rank: int, rows: int, columns: int) -> None:
    if not 0 <= rank <= min(rows, columns):
        raise ValueError(f"rank {rank} is outside 0..{min(rows, columns)} of [{rows}, {columns}]")


def _top_eigenvectors(matrix: Float, rank: int) -> Float:
    """Eigenvectors of the ``rank`` largest eigenvalues of a symmetric matrix, largest first."""
    vectors: Float = np.linalg.eigh(matrix)[1]
    return vectors[:, ::-1][:, :rank]


def _balanced(b: Float, a: Float) -> tuple[Float, Float]:
    """The same product with equal norms on both sides, so that float16 fits both alike."""
    left = np.linalg.norm(b, axis=0)
    right = np.linalg.norm(a, axis=1)
    used = (left > 0) & (right > 0)
    scale = np.sqrt(np.divide(right, left, out=np.zeros_like(left), where=used))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=used)
    return b * scale, a * inverse[:, None]
