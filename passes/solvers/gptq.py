"""GPTQ and SparseGPT: settle a weight column by column, pushing each error into later columns.

Source: Frantar et al., GPTQ, arXiv:2210.17323, in the equivalent form of Chee et al., QuIP,
arXiv:2307.13304 (LDLQ), which needs no inverse. With ``H = M D M^T``, ``M`` unit upper triangular
and ``D`` diagonal, the error ``E = W - W_hat`` costs ``tr(E H E^T) = sum_k D_k |E M e_k|^2``, and
rounding ``W_k + E_{<k} M_{<k,k}`` to the nearest code makes every term as small as the columns
before allow. ``M`` is read off one Cholesky factor; GPTQ's own recursion through the inverse
gives the same codes.

Frantar and Alistarh, SparseGPT, arXiv:2301.00774, set weights to zero in the same loop. The score
of a weight there is ``w^2 / (H^-1)_kk`` with the inverse over the columns to come, whose diagonal
is ``1 / D_k``: so it is ``w^2 D_k``. ``w`` is the weight that is best beside the columns settled so
far while all others are free. Feedback is what a column wants beside *settled* ones, so the errors
of the free columns before it are what their own feedback makes them: a triangular solve.

Everything runs transposed, ``[K, N]``: a column of the weight is then one contiguous row, and
linears that share their input are simply more rows of ``N``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from eoracc.passes.solvers.grid import Grid, find_grid, fit_slab, group_width, groups, to_nbits
from eoracc.passes.solvers.sparsity import Mask, Sparsity, keep_all_but
from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["Feedback", "feedback", "gptq", "prune_columns", "round_rows"]

_INNER = 32
"""Columns whose mutual feedback is applied one by one; beyond, it is applied by matrix products."""
_OUTER = 128
"""Columns per outer block where no group of freshly fitted scales sets it."""
_DAMPING_STEP = 10.0
_MIN_DAMPING = 1e-4


@dataclass(frozen=True, eq=False, kw_only=True)
class Feedback:
    """What GPTQ needs of a Gram; one serves every linear that shares the input.

    Attributes:
      order: ``int [K]``, the columns in the order in which they are rounded.
      weights: ``float32 [K, K]``, ``M^T`` in that order: row ``k`` says how much of each earlier
        column's error goes into column ``k``.
      pivots: ``float64 [K]``, ``D`` in that order: the cost of a squared error in column ``k``
        that the columns to come can no longer make good.
      damping: what was added to the diagonal, as a fraction of its mean; more than was asked for
        where the Gram was too close to singular.
      least_share: the smallest share of a column's damped energy that its pivot keeps, in 0..1.
        Below ``K`` times the unit roundoff of the Gram's sums it is nothing but rounding. Scales
        of columns do not enter it.
    """

    order: NDArray[np.intp]
    weights: NDArray[np.float32]
    pivots: NDArray[np.float64]
    damping: float
    least_share: float


def feedback(
    gram: NDArray[np.float64], *, damping: float = 0.01, act_order: bool = True, run: int = 1
) -> Feedback:
    """Factor a Gram for :func:`gptq`.

    Args:
      gram: ``float64 [K, K]``, symmetric positive semidefinite, may be singular.
      damping: fraction of the mean diagonal added to the diagonal. It is raised tenfold, as often
        as needed, where the Cholesky factorization fails.
      act_order: round the columns with the largest activations first.
      run: consecutive columns that stay together in the order; it divides ``K``.
    """
    energy = np.diagonal(gram).copy()
    dead = energy <= 0
    mean = float(energy[~dead].mean()) if not dead.all() else 1.0
    # A dead column's input is always zero: any diagonal decouples it and rounds it to nearest.
    energy[dead] = mean
    order = np.arange(len(energy))
    if act_order:
        runs = np.argsort(-energy.reshape(-1, run).sum(axis=1), kind="stable")
        order = order.reshape(-1, run)[runs].ravel()
    # Cholesky factors of the reversed matrix, reversed again, are upper triangular.
    backward = order[::-1]
    reordered = gram[np.ix_(backward, backward)]
    diagonal = energy[backward]
    while True:
        np.fill_diagonal(reordered, diagonal + damping * mean)
        try:
            factor = np.linalg.cholesky(reordered)
            break
        except np.linalg.LinAlgError:
            damping = max(damping * _DAMPING_STEP, _MIN_DAMPING)
    roots = np.diagonal(factor)
    weights = (factor / roots).T[::-1, ::-1]
    return Feedback(
        order=order,
        weights=np.ascontiguousarray(weights, dtype=np.float32),
        pivots=(roots**2)[::-1].copy(),
        damping=damping,
        least_share=float(np.min(roots**2 / (diagonal + damping * mean))),
    )


def gptq(
    weight: NDArray[np.float32],
    gram: NDArray[np.float64] | Feedback,
    *,
    bits: int,
    group_size: int,
    symmetric: bool = False,
    act_order: bool = True,
    damping: float = 0.01,
    clip_search: bool = True,
    pruning: Sparsity | Mask | None = None,
) -> NBitsWeight:
    """Quantize ``weight`` so that its output on the calibration tokens changes least.

    Args:
      weight: ``float32 [N, K]``; linears that share the input may be stacked along ``N``.
      gram: ``float64 [K, K]``, or what :func:`feedback` made of it (``act_order`` and ``damping``
        are then those it was made with).
      bits: 2, 3, 4, 6 or 8.
      group_size: a multiple of 8, or -1 for whole rows.
      symmetric: fix zero points at ``2**(bits - 1)``.
      act_order: round the columns with the largest activations first. Groups keep the columns of
        the original order; their scales are then chosen from the original weight.
      damping: fraction of the mean diagonal added to the diagonal.
      clip_search: see :func:`eoracc.passes.solvers.grid.find_grid`.
      pruning: weights to set to zero in the same solve: those that a mask ``[N, K]`` does not keep,
        or as many as a sparsity says, chosen on the way (:func:`prune_columns`). The runs of a
        pattern must stay together in the order of the columns. None prunes nothing.

    Returns:
      The quantized weight; its scales are float16. A weight that is pruned has the code of its
      zero point, and with it the value 0.
    """
    if not isinstance(gram, Feedback):
        run = max(pruning.run, 1) if isinstance(pruning, Sparsity) else 1
        gram = feedback(gram, damping=damping, act_order=act_order, run=run)
    rows, columns = weight.shape
    width = group_width(group_size, columns)
    in_order = bool((np.diff(gram.order) > 0).all())
    # The grid of a group that is one run of columns waits until that run is reached, so that it
    # fits the weights as updated by then. Scattered groups have no such moment.
    deferred = in_order and width < columns
    importance = np.empty(columns)
    importance[gram.order] = gram.pivots

    source = np.ascontiguousarray(weight.T[gram.order])
    error = np.empty_like(source)
    codes = np.empty((columns, rows), np.uint8)
    scales = np.empty((-(-columns // width), rows), np.float16)
    zero_points = np.empty(scales.shape, np.uint8)
    pruner = None if pruning is None else _Pruner(pruning, source, gram)
    if not deferred:
        grid = find_grid(
            weight if pruner is None else _survivors(weight, pruner.foreseen, gram.order),
            bits=bits,
            group_size=group_size,
            symmetric=symmetric,
            importance=importance,
            clip_search=clip_search,
        )
        scales[:] = grid.scales.T
        zero_points[:] = 2 ** (bits - 1) if grid.zero_points is None else grid.zero_points.T

    for outer in groups(columns, width if deferred else _OUTER):
        start = outer.start
        target = source[outer] + gram.weights[outer, :start] @ error[:start]
        if pruner is not None:
            pruner.enter(outer, target, source[outer], gram.weights[outer, outer])
        if deferred:
            group = start // width
            scales[group], zero_points[group] = fit_slab(
                target if pruner is None else target * pruner.kept,
                bits=bits,
                symmetric=symmetric,
                importance=gram.pivots[outer],
                clip_search=clip_search,
            )
        members = gram.order[outer] // width
        _round_block(
            target,
            scales=scales[members].astype(np.float32),
            zero_points=zero_points[members].astype(np.float32),
            top=2**bits - 1,
            source=source[outer],
            weights=gram.weights[outer, outer],
            codes=codes[outer],
            error=error[outer],
            pruner=pruner,
        )

    unordered = np.empty_like(codes)
    unordered[gram.order] = codes
    return to_nbits(
        np.ascontiguousarray(unordered.T),
        Grid(
            scales=np.ascontiguousarray(scales.T),
            zero_points=None if symmetric else np.ascontiguousarray(zero_points.T),
            bits=bits,
            group_size=width,
        ),
    )


def round_rows(
    weight: NDArray[np.float32],
    feedback: Feedback,
    scale: NDArray[np.floating],
    *,
    largest: int,
) -> NDArray[np.int8]:
    """Round ``weight`` to multiples of a step a row, with the same feedback from column to column.

    Args:
      weight: ``float32 [N, K]``.
      feedback: of the Gram.
      scale: the step of each row, ``[N]``; a row whose step is 0 becomes 0.
      largest: magnitude of the largest code.

    Returns:
      ``int8 [N, K]``, codes symmetric about 0.
    """
    rows, columns = weight.shape
    source = np.ascontiguousarray(weight.T[feedback.order])
    error = np.empty_like(source)
    codes = np.empty((columns, rows), np.uint8)
    steps = np.where(scale > 0, scale, 1).astype(np.float32)
    for outer in groups(columns, _OUTER):
        start = outer.start
        shape = source[outer].shape
        _round_block(
            source[outer] + feedback.weights[outer, :start] @ error[:start],
            scales=np.broadcast_to(steps, shape),
            zero_points=np.broadcast_to(np.float32(largest), shape),
            top=2 * largest,
            source=source[outer],
            weights=feedback.weights[outer, outer],
            codes=codes[outer],
            error=error[outer],
        )
    values = np.empty((columns, rows), np.int8)
    values[feedback.order] = codes.astype(np.int16) - largest
    values[:, scale <= 0] = 0
    return np.ascontiguousarray(values.T)


def prune_columns(
    weight: NDArray[np.float32], feedback: Feedback, sparsity: Sparsity
) -> NDArray[np.float32]:
    """Set weights to zero, each error pushed into the columns to come: SparseGPT.

    The weights of a pattern are chosen when its run of columns is reached, those of a mere share
    for 128 columns at a time and all rows together. The share of each 128 is that of a choice by
    the same score before the solve, and not the same for all as in the paper: columns of small
    inputs lose more.

    Args:
      weight: ``float32 [N, K]``.
      feedback: of the Gram; the runs of a pattern must stay together in its order.
      sparsity: how many are set to zero.

    Returns:
      ``float32 [N, K]`` with exact zeros.
    """
    columns = weight.shape[1]
    source = np.ascontiguousarray(weight.T[feedback.order])
    error = np.empty_like(source)
    pruned = np.empty_like(source)
    pruner = _Pruner(sparsity, source, feedback)
    for outer in groups(columns, _OUTER):
        start = outer.start
        target = source[outer] + feedback.weights[outer, :start] @ error[:start]
        pruner.enter(outer, target, source[outer], feedback.weights[outer, outer])
        _settle(
            target,
            pruner.settle,
            source=source[outer],
            weights=feedback.weights[outer, outer],
            error=error[outer],
            pruner=pruner,
        )
        pruned[feedback.order[outer]] = target
    return np.ascontiguousarray(pruned.T)


class _Pruner:
    """The mask of one outer block after the other, while their columns are settled.

    Attributes:
      foreseen: ``bool [columns, N]``, in the order of the columns: what a choice before the solve
        would keep. A share is spread over the blocks as it would spread it.
      kept: ``bool [columns, N]`` of the present block. What a pattern keeps is final once the run
        has been reached, the rest once the block has been entered.
    """

    def __init__(
        self, pruning: Sparsity | Mask, source: NDArray[np.float32], feedback: Feedback
    ) -> None:
        """Foresee the mask.

        Args:
          pruning: what is kept, or how much is removed.
          source: the weight, ``float32 [columns, N]`` in the order of ``feedback``.
          feedback: of the Gram.
        """
        self._sparsity = pruning if isinstance(pruning, Sparsity) else None
        # Roots of scores have the order of scores, and no overflow.
        self._roots = np.sqrt(feedback.pivots).astype(np.float32)[:, None]
        if isinstance(pruning, Sparsity):
            self.foreseen = pruning.mask_of_weights((np.abs(source) * self._roots).T).T
        else:
            self.foreseen = pruning.T[feedback.order]
        self._block = slice(0, 0)
        self._source = self._weights = source[:0]
        self.kept: Mask = self.foreseen[:0]

    @property
    def run(self) -> int:
        """Columns that are decided on together when they are reached; 0 for none."""
        return 0 if self._sparsity is None else self._sparsity.run

    def enter(
        self,
        block: slice,
        target: NDArray[np.float32],
        source: NDArray[np.float32],
        weights: NDArray[np.float32],
    ) -> None:
        """Begin with ``block``; the other arguments are those of :func:`_settle`."""
        self._block, self._source, self._weights = block, source, weights
        foreseen = self.foreseen[block]
        if self._sparsity is None:
            self.kept = foreseen
            return
        scores = self._scores(slice(0, len(target)), target)
        if self.run:
            self.kept = np.ascontiguousarray(self._sparsity.mask_of_rows(scores.T).T)
        else:
            self.kept = keep_all_but(scores, int(np.count_nonzero(~foreseen)))

    def reach(self, columns: slice, wanted: NDArray[np.float32]) -> None:
        """Decide on a run of columns of the block, which have the feedback of all before them."""
        assert self._sparsity is not None  # noqa: S101 - there is a run
        self.kept[columns] = self._sparsity.mask_of_rows(self._scores(columns, wanted).T).T

    def _scores(self, columns: slice, wanted: NDArray[np.float32]) -> NDArray[np.float32]:
        """The scores of columns of the block, free ones with the feedback of settled ones."""
        source = self._source[columns]
        best = source + scipy.linalg.solve_triangular(
            self._weights[columns, columns],
            wanted - source,
            lower=True,
            unit_diagonal=True,
            check_finite=False,
        )
        return np.abs(best) * self._roots[self._block][columns]

    def settle(self, column: int, wanted: NDArray[np.float32]) -> None:
        """Set to zero what a column of the block does not keep."""
        # No product: it would leave negative zeros.
        np.copyto(wanted, np.float32(0), where=~self.kept[column])


def _survivors(
    weight: NDArray[np.float32], foreseen: Mask, order: NDArray[np.intp]
) -> NDArray[np.float32]:
    """``weight [N, K]`` with zeros for what will probably be pruned."""
    kept = np.empty_like(foreseen)
    kept[order] = foreseen
    return weight * kept.T


def _round_block(
    target: NDArray[np.float32],
    *,
    scales: NDArray[np.float32],
    zero_points: NDArray[np.float32],
    top: int,
    source: NDArray[np.float32],
    weights: NDArray[np.float32],
    codes: NDArray[np.uint8],
    error: NDArray[np.float32],
    pruner: _Pruner | None = None,
) -> None:
    """Round the columns of one outer block, all arrays ``[columns, N]`` but ``weights``.

    ``target`` already holds the feedback from all earlier blocks; ``codes`` and ``error`` are
    filled in.
    """
    inverse = 1 / scales
    floor, ceiling = -zero_points, top - zero_points
    offsets = np.empty_like(target)

    def settle(column: int, wanted: NDArray[np.float32]) -> None:
        if pruner is not None:
            pruner.settle(column, wanted)
        offset = offsets[column]
        np.multiply(wanted, inverse[column], out=offset)
        np.rint(offset, out=offset)
        np.maximum(offset, floor[column], out=offset)
        np.minimum(offset, ceiling[column], out=offset)
        np.multiply(offset, scales[column], out=wanted)

    _settle(target, settle, source=source, weights=weights, error=error, pruner=pruner)
    offsets += zero_points
    codes[:] = offsets


def _settle(
    target: NDArray[np.float32],
    settle: Callable[[int, NDArray[np.float32]], None],
    *,
    source: NDArray[np.float32],
    weights: NDArray[np.float32],
    error: NDArray[np.float32],
    pruner: _Pruner | None,
) -> None:
    """Settle the columns of one outer block in turn, all arrays ``[columns, N]`` but ``weights``.

    Args:
      target: the weights with the feedback from all earlier blocks; the stored values replace
        them.
      settle: given the place of a column and its weights, which it replaces by stored values.
      source: the original weights.
      weights: of the feedback, ``[columns, columns]``.
      error: filled in.
      pruner: asked when a run of columns is reached; None for no pruning.
    """
    run = 0 if pruner is None else pruner.run
    for inner in groups(len(target), _INNER):
        first = inner.start
        if first:
            target[inner] += weights[inner, :first] @ error[:first]
        for column in range(first, inner.stop):
            if pruner is not None and run and column % run == 0:
                ahead = slice(column, column + run)
                met = weights[ahead, first:column] @ error[first:column]
                pruner.reach(ahead, target[ahead] + met)
            wanted = target[column]
            if column > first:
                wanted += weights[column, first:column] @ error[first:column]
            settle(column, wanted)
            np.subtract(source[column], wanted, out=error[column])
