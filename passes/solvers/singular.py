"""The top singular vectors of a matrix, without the rest of its decomposition.

Every compensation comes down to the top left singular vectors of a weighted error, a few dozen out
of thousands. Two ways lead there, each where it is the faster (``benchmarks/solvers.py``):

- **exact**: some eigenvectors of the smaller Gram side, from its tridiagonal form. Half the work of
  all eigenvectors, and a fifth of an SVD's; its cost grows with the cube of that side.
- **block Krylov**: the best vectors within ``span(Z, M Z, M^2 Z, ...)``, ``M = X X^T``, grown block
  by block from a seeded start until what is left of the error has settled. Source: Musco and Musco,
  "Randomized Block Krylov Methods", arXiv:1504.05477, with a test of convergence in
  place of a fixed number of blocks.

Quantization errors have flat spectra: their singular *vectors* are ill-conditioned and converge
slowly. What compensation needs is the error that is left, and that converges fast.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

__all__ = ["TOLERANCE", "top_left_vectors"]

Float = NDArray[np.floating]

TOLERANCE: Final = 2e-4
"""By how much the error left may exceed its optimum, relatively, as estimated."""

_EXACT_SIDE = 1024
"""Up to this smaller side the exact way is the faster one."""
_EXACT_SHARE = 8
"""So it is where the rank exceeds one in so many of that side."""
_SUBSET_SHARE = 4
"""Up to one in so many of that side, some eigenvectors are found faster than all of them."""
_BLOCK = 32
"""Columns that the Krylov space grows by."""
_ROOM = 100
"""How many roundings of the largest squared singular value the smallest one kept has to exceed."""
_RATIOS = (0.5, 0.95)
"""Between these a ratio of successive gains is believed: one large singular value that is caught at
once says nothing of how fast the rest converges."""


def top_left_vectors(matrix: Float, rank: int) -> Float:
    """Orthonormal ``U [rows, rank]`` that leave (almost) the least of ``matrix - U U^T matrix``.

    The span is that of the top left singular vectors, which are its columns, largest first, where
    their singular values are told apart. The result is the same on every call.

    Squared singular values are what both ways work with. Where those of a float32 matrix span more
    than its digits hold (an input of a few huge tokens does that), float64 takes over: what is
    small next to the largest one would be rounding otherwise.

    Args:
      matrix: float32 or float64 ``[rows, columns]``.
      rank: in ``0..min(rows, columns)``.

    Returns:
      ``U``, of the type of ``matrix``, such that ``||matrix - U U^T matrix||_F`` exceeds the
      optimum by 0.1% at most, and by rounding only where the smaller side is 1024 at most.

    >>> top_left_vectors(np.diag([2.0, 3.0]), 1).round(6).tolist()
    [[0.0], [1.0]]
    """
    if rank == 0:
        return np.zeros((len(matrix), 0), matrix.dtype)
    vectors = _vectors(matrix, rank)
    if matrix.dtype == np.float32 and _drown(matrix, vectors):
        vectors = _vectors(matrix.astype(np.float64), rank).astype(np.float32)
    return _signed(vectors)


def _vectors(matrix: Float, rank: int) -> Float:
    """The vectors by whichever way is the faster, in the precision of ``matrix``."""
    vectors = None
    side = min(matrix.shape)
    if side > _EXACT_SIDE and rank * _EXACT_SHARE <= side:
        vectors = _krylov(matrix, rank)
    return _exact(matrix, rank) if vectors is None else vectors


def _drown(matrix: Float, vectors: Float) -> bool:
    """Whether the least of ``vectors`` may be rounding of the largest one's square."""
    caught = np.square(vectors.T @ matrix).sum(axis=1)
    return bool(caught.min() < _ROOM * np.finfo(matrix.dtype).eps * caught.max())


def _exact(matrix: Float, rank: int) -> Float:
    rows, columns = matrix.shape
    if rows <= columns:
        return _top_eigenvectors(matrix @ matrix.T, rank)
    # These columns are the vectors times the singular values; QR only normalises them.
    return np.linalg.qr(matrix @ _top_eigenvectors(matrix.T @ matrix, rank))[0]


def _top_eigenvectors(gram: Float, rank: int) -> Float:
    side = len(gram)
    vectors: Float
    if rank * _SUBSET_SHARE > side:
        # Divide and conquer gives all of them in half the time that so many take one by one.
        vectors = np.linalg.eigh(gram)[1][:, side - rank :]
        return vectors[:, ::-1]
    vectors = scipy.linalg.eigh(
        gram, subset_by_index=(side - rank, side - 1), driver="evr", overwrite_a=True
    )[1]
    return vectors[:, ::-1]


def _krylov(matrix: Float, rank: int) -> Float | None:
    """By a Krylov space of the smaller side.

    None where the space would outgrow half of that side, or where the matrix has a smaller rank.
    """
    rows, columns = matrix.shape
    wide = matrix if rows <= columns else matrix.T
    side = len(wide)
    total = float(np.einsum("ij,ij->i", matrix, matrix).sum(dtype=np.float64))
    basis = np.empty((side, side // 2), matrix.dtype, order="F")
    images = np.empty((max(rows, columns), side // 2), matrix.dtype, order="F")
    inner = np.empty((side // 2, side // 2), matrix.dtype)
    start = np.random.default_rng(0).standard_normal((side, _BLOCK))
    block = np.linalg.qr(start.astype(matrix.dtype))[0]
    negligible = float(np.finfo(matrix.dtype).eps) * total
    settled = _Settled(total)
    for first in range(0, side // 2 - _BLOCK + 1, _BLOCK):
        width = first + _BLOCK
        basis[:, first:width] = block
        images[:, first:width] = wide.T @ block
        # Of the Gram of all images only the last block's share is new.
        inner[:width, first:width] = images[:, :width].T @ images[:, first:width]
        inner[first:width, :first] = inner[:first, first:width].T
        block, triangle = np.linalg.qr(_off(basis[:, :width], wide @ images[:, first:width]))
        # Once leaves rounding where the block is close to the span.
        block = np.linalg.qr(_off(basis[:, :width], block))[0]
        if width >= rank:
            energies, turns = np.linalg.eigh(inner[:width, :width])
            if settled(float(energies[-rank:].sum(dtype=np.float64))):
                chosen = turns[:, ::-1][:, :rank]
                held = basis if rows <= columns else images
                vectors: Float = held[:, :width] @ chosen
                return vectors if rows <= columns else np.linalg.qr(vectors)[0]
        # A direction of nothing but rounding has no place in the basis.
        if np.abs(np.diagonal(triangle)).min() <= negligible:
            return None
    return None


def _off(basis: Float, block: Float) -> Float:
    """``block`` without its part in the span of ``basis``."""
    off: Float = block - basis @ (basis.T @ block)
    return off


class _Settled:
    """Whether a growing space has caught all but a negligible share of what it can.

    What it catches grows by gains that shrink about geometrically. Their sum to come, extrapolated
    from the last two, is compared with what is left.
    """

    def __init__(self, total: float) -> None:
        """Begin with ``total``, the squared norm of the matrix."""
        self._total = total
        self._caught: float | None = None
        self._gain: float | None = None

    def __call__(self, caught: float) -> bool:
        """Note what the space catches now, of the squared norm."""
        before, self._caught = self._caught, caught
        if before is None:
            return False
        last, self._gain = self._gain, max(caught - before, 0.0)
        if last is None:
            return False
        least, most = _RATIOS
        ratio = min(max(self._gain / last, least), most) if last > 0 else least
        # Of norms, not of their squares, hence twice the tolerance.
        to_come = self._gain * ratio / (1 - ratio)
        return to_come <= 2 * TOLERANCE * max(self._total - caught, 0.0)


def _signed(vectors: Float) -> Float:
    """Each column's sign such that its largest entry is positive: solvers leave it to chance."""
    largest = np.abs(vectors).argmax(axis=0)
    signs = np.where(vectors[largest, np.arange(vectors.shape[1])] < 0, -1, 1)
    signed: Float = vectors * signs.astype(vectors.dtype)
    return signed
