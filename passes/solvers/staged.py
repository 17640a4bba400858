"""Low-rank weights by projection: the core that all factorisations share.

A factorisation replaces ``W`` by ``u v``. Where ``u`` is orthonormal, ``v = u^T W`` is the best
there is in *every* metric of the inputs, for ``W - u v = (I - u u^T) W`` has nothing left in the
span of ``u``. So plain, activation-scaled, whitened, nested and residual-compensated SVDs are all
projections ``W_hat = P W``, ``P = u u^T``, and differ in the span they choose. No metric is ever
inverted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.solvers.factors import balanced
from eoracc.passes.solvers.singular import top_left_vectors

__all__ = ["Stage", "staged_factors"]

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Stage:
    """One truncated SVD of what the stages before it have left.

    Attributes:
      rank: directions that it adds.
      root: ``S`` with the metric ``S S^T``, ``float64 [K, any]``, or its diagonal ``[K]``; None
        weighs all inputs alike.
    """

    rank: int
    root: Float | None = None

    def weigh(self, matrix: Float) -> Float:
        """``matrix S``, ``float64 [N, K]``."""
        if self.root is None:
            return matrix
        return matrix * self.root if self.root.ndim == 1 else matrix @ self.root


def staged_factors(weight: NDArray[np.floating], stages: Sequence[Stage]) -> tuple[Float, Float]:
    """The factors that a sequence of truncated SVDs, each of the residual before it, adds up to.

    Stage ``t`` takes the top left singular vectors ``U_t`` of ``R_t S_t``, where ``R_1 = W`` and
    ``R_{t+1} = R_t - U_t U_t^T R_t``. Each stage is orthogonal to the ones before, so that the
    whole is ``u = [U_1 U_2 ...]``, ``v = u^T W``. Stages in the *same* metric equal one SVD of
    their ranks' sum.

    A metric that does not tell so many directions apart (a singular Gram) gives those it does;
    the rest of that stage's rank goes to the plain SVD of what is left.

    Args:
      weight: ``W``, ``[N, K]``; everything is computed in float64.
      stages: their ranks add up to ``0..min(N, K)``.

    Returns:
      ``u [N, r]`` and ``v [r, K]``, float64, with the norm of each direction shared evenly between
      its column and its row. For a plain SVD that is ``U sqrt(Sigma)`` and ``sqrt(Sigma) V^T``; in
      other metrics published ones share the singular values of ``W S``, which scales a column up
      and its row down: the product is the same.

    Raises:
      ValueError: a rank is negative, or their sum exceeds the smaller side.

    >>> u, v = staged_factors(np.diag([3.0, 2.0]), [Stage(1, np.array([1.0, 4.0]))])
    >>> np.round(u @ v, 12).tolist()
    [[0.0, 0.0], [0.0, 2.0]]
    """
    whole = np.asarray(weight, np.float64)
    left = whole
    _check(stages, left)
    bases: list[Float] = []
    rows: list[Float] = []
    for stage in stages:
        for basis in _directions(left, stage, whole):
            projected = basis.T @ left
            left = left - basis @ projected
            bases.append(basis)
            rows.append(projected)
    if not bases:
        return np.zeros((len(left), 0)), np.zeros((0, left.shape[1]))
    return balanced(np.concatenate(bases, axis=1), np.concatenate(rows))


def _directions(left: Float, stage: Stage, whole: Float) -> list[Float]:
    """Orthonormal directions of one stage: in its metric as far as that goes, then without it.

    Args:
      left: the residual of ``whole`` after earlier stages.
      stage: its rank and metric.
      whole: the weight.
    """
    if stage.rank == 0:
        return []
    weighted = stage.weigh(left)
    basis = _top(weighted, min(stage.rank, *weighted.shape))
    if stage.root is None:
        return [basis]
    singular = np.linalg.norm(basis.T @ weighted, axis=1)
    # Directions come from squared singular values: below the root of eps they are rounding. That is
    # relative to the weight, not to a residual that may be rounding as a whole.
    largest = singular.max(initial=0.0)
    if left is not whole:
        largest = max(largest, float(np.linalg.norm(stage.weigh(whole))))
    floor = np.sqrt(max(left.shape) * np.finfo(np.float64).eps) * largest
    known = int((singular > floor).sum())
    if known == stage.rank:
        return [basis]
    basis = basis[:, :known]
    rest = left - basis @ (basis.T @ left)
    return [basis, _top(rest, stage.rank - known)]


def _top(matrix: Float, rank: int) -> Float:
    return top_left_vectors(matrix, rank).astype(np.float64, copy=False)


def _check(stages: Sequence[Stage], weight: Float) -> None:
    limit = min(weight.shape)
    total = sum(stage.rank for stage in stages)
    if any(stage.rank < 0 for stage in stages) or total > limit:
        raise ValueError(
            f"ranks {[stage.rank for stage in stages]} are outside 0..{limit} of "
            f"[{weight.shape[0]}, {weight.shape[1]}]"
        )
