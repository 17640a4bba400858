"""ERC-SVD's solver: a whitened SVD, and SVDs of the residual that its truncation leaves.

Source: Bai et al., ERC-SVD: Error-Controlled SVD for Large Language Model Compression,
arXiv:2505.20112, section 3.1 and algorithm 1-2.

Of ``r`` directions ``r_i`` are chosen by activations and ``r_r = r - r_i`` by the residual ``R = W
- W_{r_i}``. Both stages together are a projection (:mod:`eoracc.passes.solvers.staged`). In output
error over the calibration tokens no split beats ``r_r = 0``, which is SVD-LLM; what the residual's
plain SVD buys is error along inputs that calibration did not show.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.solvers.staged import Stage, staged_factors

__all__ = ["Metric", "adaptive_residual_rank", "erc_factors", "residual_rank"]

Float = NDArray[np.float64]

Metric = Literal["weight", "activation"]

_SHARES: Final = (0.0, 0.025, 0.05, 0.1, 0.2)
"""``beta`` that the adaptive split chooses from."""


def residual_rank(beta: float, rank: int, out_features: int, in_features: int) -> int:
    """``r_r = floor(beta m n / (m + n))``, ``rank`` at most.

    Args:
      beta: share of the weight's parameters that the residual's factors have.
      rank: of both stages together.
      out_features: ``m``.
      in_features: ``n``.

    >>> residual_rank(0.05, 230, 576, 576)
    14
    """
    return min(rank, int(beta * out_features * in_features / (out_features + in_features)))


def erc_factors(
    weight: NDArray[np.floating],
    root: Float,
    rank: int,
    residual: int,
    *,
    metric: Metric = "weight",
    stages: int = 2,
) -> tuple[Float, Float]:
    """Factors of a whitened SVD of rank ``r - r_r`` and of SVDs of its residual, concatenated.

    Args:
      weight: ``[N, K]``.
      root: ``S``, ``float64 [K, K]``, ``S S^T = H``.
      rank: ``r``, in ``0..min(N, K)``.
      residual: ``r_r``, in ``0..r``.
      metric: of the residual's SVD. ``weight`` is the paper's plain SVD. ``activation`` takes the
        residual times ``S``: then all stages are one SVD of ``W S``, and ``r_r`` has no effect.
      stages: ``T``. 2 is the paper's; 1 is SVD-LLM. Beyond, ``r_r`` is shared evenly by the
        ``T - 1`` later stages, the first of which get what is left over, and their metrics take
        turns: ``metric``, ``activation``, ``metric``, ... (Further stages in the same metric would
        be one SVD.)

    Returns:
      ``u [N, r]`` and ``v [r, K]``.

    Raises:
      ValueError: a rank is out of range.

    >>> u, v = erc_factors(np.diag([3.0, 2.0, 1.0]), np.diag([1.0, 1.0, 9.0]), 2, 1)
    >>> (u @ v).round(12).diagonal().tolist()
    [3.0, 0.0, 1.0]
    """
    if stages == 1:
        residual = 0
    plan = [Stage(rank - residual, root)]
    later = max(stages - 1, 1)
    for turn in range(later):
        share = residual // later + (turn < residual % later)
        plain = metric == "weight" and turn % 2 == 0
        plan.append(Stage(share, None if plain else root))
    return staged_factors(weight, plan)


def adaptive_residual_rank(weight: NDArray[np.floating], root: Float, rank: int) -> int:
    """The split that leaves the least product of relative errors in both metrics.

    ``r_r = argmin ||R S||^2 / ||W S||^2 * ||R||^2 / ||W||^2``, ``R = W - u v``, over
    ``beta`` in {0, 0.025, 0.05, 0.1, 0.2}. The rank of the matrix, hence its share of the model's
    parameters, stays as it is. Where the residual's spectrum is flat, plain directions take little
    of ``||R||`` for what they cost in ``||R S||``, and few are chosen.

    Not of the paper, whose ``beta`` is the same for all matrices.

    Args:
      weight: ``[N, K]``.
      root: ``S``, ``float64 [K, K]``, ``S S^T = H``.
      rank: of both stages together, in ``0..min(N, K)``.

    Returns:
      ``r_r``; of equals the smallest.
    """
    weight = np.asarray(weight, np.float64)

    def error(residual: int) -> float:
        u, v = erc_factors(weight, root, rank, residual)
        left = weight - u @ v
        return float(np.vdot(left, left)) * float(np.linalg.norm(left @ root)) ** 2

    ranks = {residual_rank(beta, rank, *weight.shape) for beta in _SHARES}
    return min(sorted(ranks), key=error)
