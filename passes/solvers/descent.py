"""Coordinate descent on the scales and codes of a quantized weight.

GPTQ chooses each code once, and the scales before any code. Descent then revisits every scale and
every code while all others are held: the output error ``tr(E H E^T)``, ``E = T - W_hat``, is a
parabola in each of them, so the best value has a closed form and the error never grows.

Source: Behdin et al., QuantEase, arXiv:2309.01885, for the codes; a group's scale is treated
as one more coordinate.

As in :mod:`.gptq`, everything runs transposed, ``[K, N]``, and rows of ``W`` are independent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from eoracc.passes.solvers.grid import groups
from eoracc.plugins.operands.weight import NBitsWeight

__all__ = ["descend"]

_INNER = 64
"""Columns that update each other one by one; blocks of them update the rest by matrix products."""

Float = NDArray[np.float32]


def descend(
    target: Float,
    weight: NBitsWeight,
    gram: NDArray[np.float64],
    *,
    sweeps: int,
    damping: float = 0.01,
    keep_zeros: bool = False,
) -> NBitsWeight:
    """Lower the output error of ``weight`` against ``target``; zero points and groups are fixed.

    A sweep visits every group and updates its scale, then its codes, column by column.

    Args:
      target: the weight to approximate, ``float32 [N, K]``.
      weight: the start, for example the result of :func:`eoracc.passes.solvers.gptq.gptq`.
      gram: of the input, ``float64 [K, K]``, symmetric positive semidefinite, may be singular.
      sweeps: passes over all groups; 0 returns ``weight``.
      damping: fraction of the Gram's mean diagonal added to its diagonal, as in GPTQ.
      keep_zeros: leave values that are 0 as they are, as those of a pruned weight.

    Returns:
      A weight with the same groups and zero points, whose error in the damped metric is not larger.
    """
    if sweeps == 0:
        return weight
    columns = weight.in_features
    metric = _damped(gram, damping)
    scales = np.ascontiguousarray(weight.scales.T, np.float32)
    zero_points: Float = (
        np.full_like(scales, 2 ** (weight.bits - 1))
        if weight.zero_points is None
        else np.ascontiguousarray(weight.zero_points.T, np.float32)
    )
    top = 2**weight.bits - 1
    wanted = np.ascontiguousarray(target.T)
    codes = np.ascontiguousarray(weight.codes().T, np.float32)
    slabs = list(groups(columns, weight.group_size))
    for index, slab in enumerate(slabs):
        codes[slab] -= zero_points[index]
    fixed = codes == 0 if keep_zeros else None
    for _ in range(sweeps):
        error = wanted.copy()
        for index, slab in enumerate(slabs):
            error[slab] -= codes[slab] * scales[index]
        # Recomputed in every sweep, so that rounding errors do not accumulate.
        gradient = metric @ error
        for index, slab in enumerate(slabs):
            before = codes[slab] * scales[index]
            own = metric[slab, slab]
            scales[index] = _best_scale(codes[slab], scales[index], own, gradient[slab])
            change = codes[slab] * scales[index] - before
            gradient[slab] -= own @ change
            _best_codes(
                codes[slab],
                scales[index],
                own,
                gradient[slab],
                floor=-zero_points[index],
                ceiling=top - zero_points[index],
                fixed=None if fixed is None else fixed[slab],
            )
            change = codes[slab] * scales[index] - before
            later = slice(slab.stop, columns)
            gradient[later] -= metric[later, slab] @ change
    for index, slab in enumerate(slabs):
        codes[slab] += zero_points[index]
    return NBitsWeight.from_codes(
        np.ascontiguousarray(codes.T).astype(np.uint8),
        np.ascontiguousarray(scales.T).astype(np.float16),
        weight.zero_points,
        bits=weight.bits,
        group_size=weight.group_size,
    )


def _damped(gram: NDArray[np.float64], damping: float) -> Float:
    """The metric of GPTQ with ``damping``; always-zero inputs get their own diagonal."""
    energy = np.diagonal(gram).copy()
    dead = energy <= 0
    mean = float(energy[~dead].mean()) if not dead.all() else 1.0
    energy[dead] = mean
    # Scaled to a mean of 1, so that float32 does not overflow on squares.
    metric = gram / mean
    np.fill_diagonal(metric, energy / mean + damping)
    return metric.astype(np.float32)


def _best_scale(codes: Float, scale: Float, metric: Float, gradient: Float) -> Float:
    """The scale ``[N]`` of one group with the least error, rounded to float16.

    With ``c`` the codes and ``s`` the scale of a row, a scale of ``s + d`` adds
    ``d^2 c.Hc - 2 d c.g`` to the error, where ``g`` is the row's ``gradient``, ``H E^T``.
    """
    slope = np.einsum("kn,kn->n", codes, gradient)
    curvature = np.einsum("kn,kn->n", codes, metric @ codes)
    step = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0)
    with np.errstate(over="ignore"):  # a scale beyond float16 becomes Inf and is rejected
        candidate = (scale + step).astype(np.float16).astype(np.float32)
    moved = candidate - scale
    usable = (candidate > 0) & np.isfinite(candidate)
    moved[~usable] = 0
    better = moved * (moved * curvature - 2 * slope) < 0
    return np.where(better, candidate, scale)


def _best_codes(
    codes: Float,
    scale: Float,
    metric: Float,
    gradient: Float,
    *,
    floor: Float,
    ceiling: Float,
    fixed: NDArray[np.bool_] | None,
) -> None:
    """Choose the codes with the least error for each column of a group in turn, in place.

    All arrays are ``[columns, N]`` or ``[N]``, except ``metric``: the group's diagonal block.
    ``gradient``, ``H E^T``, is overwritten. Codes that are ``fixed`` stay as they are.
    """
    inverse = 1 / scale
    for inner in groups(len(codes), _INNER):
        first = inner.start
        changes = np.zeros_like(codes[inner])
        for column in range(first, inner.stop):
            place = column - first
            pull = gradient[column]
            if place:
                pull -= metric[column, first:column] @ changes[:place]
            pull /= metric[column, column]
            pull *= inverse
            best = np.rint(codes[column] + pull)
            np.maximum(best, floor, out=best)
            np.minimum(best, ceiling, out=best)
            if fixed is not None:
                np.copyto(best, codes[column], where=fixed[column])
            np.multiply(best - codes[column], scale, out=changes[place])
            codes[column] = best
        gradient[inner.stop :] -= metric[inner.stop :, inner] @ changes
