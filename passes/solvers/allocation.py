"""Choose one candidate per item so that the total distortion within a budget of bytes is least.

Every linear has candidates (a width, a rank, …), each with its bytes and its distortion. Choosing
one per linear with the least sum of distortions within a budget of bytes is a multiple-choice
knapsack problem. A greedy algorithm solves its relaxation exactly:
Shoham and Gersho, "Efficient Bit Allocation for an Arbitrary Set of Quantizers", IEEE ASSP 36
(1988), and Sinha and Zoltners, "The Multiple-Choice Knapsack Problem", Operations Research 27
(1979).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["Allocation", "BudgetError", "Candidate", "allocate", "least_bytes", "tail_energies"]


class BudgetError(ValueError):
    """A budget is below the bytes of the smallest candidates."""


class Candidate(NamedTuple):
    """One way of storing an item.

    Attributes:
      nbytes: its size.
      distortion: its error, comparable between items; not NaN.
    """

    nbytes: int
    distortion: float


@dataclass(frozen=True)
class Allocation:
    """The choice of :func:`allocate`.

    Attributes:
      chosen: index of each item's candidate.
      nbytes: their total size.
      distortion: their total distortion.
      bound: a lower bound on the distortion of every choice within the budget.
    """

    chosen: tuple[int, ...]
    nbytes: int
    distortion: float
    bound: float


def allocate(items: Sequence[Sequence[Candidate]], budget: int) -> Allocation:
    """Choose a candidate for each of ``items``, with the least total distortion for the bytes.

    Every item starts with its smallest candidate and climbs the lower convex hull of its
    candidates. The steepest step (distortion per byte) of all items is taken first, until the next
    step does not fit: the choice up to there is optimal for its bytes. Further steps, on or off the
    hull, then spend the remaining bytes.

    Args:
      items: at least one candidate each.
      budget: bytes, for all items together.

    Returns:
      The choice. Its distortion exceeds the optimum by less than the gain of the one step that did
      not fit, and by ``distortion - bound`` at most.

    Raises:
      BudgetError: the smallest candidates take more than ``budget``.

    >>> items = [[Candidate(1, 9.0), Candidate(2, 1.0)], [Candidate(1, 4.0), Candidate(3, 2.0)]]
    >>> allocate(items, 3)
    Allocation(chosen=(1, 0), nbytes=3, distortion=5.0, bound=5.0)
    """
    hulls = [_hull(candidates) for candidates in items]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(items[i][at].nbytes for i, at in enumerate(chosen))
    if left < 0:
        raise BudgetError(
            f"the smallest candidates take {budget - left} bytes, and the budget is {budget}"
        )
    # The gain of the first step that does not fit, taken in part: with it the distortion is the
    # relaxation's optimum, a lower bound for every choice.
    beyond = 0.0
    for item, at, step in _steps(items, hulls):
        if step.nbytes > left:
            beyond = step.distortion * left / step.nbytes
            break
        chosen[item] = at
        left -= step.nbytes
    bound = _distortion(items, chosen) - beyond
    left = _fill(items, chosen, left)
    return Allocation(tuple(chosen), budget - left, _distortion(items, chosen), bound)


def least_bytes(items: Sequence[Sequence[Candidate]]) -> int:
    """Bytes of the smallest candidates: a lower bound for every budget."""
    return sum(min(candidate.nbytes for candidate in candidates) for candidates in items)


def tail_energies(
    energies: NDArray[np.floating], total: float, ranks: Sequence[int]
) -> NDArray[np.float64]:
    """The weighted error that remains after the best correction of each of ``ranks``.

    ``total - sum_{i <= r} sigma_i^2``, by Eckart and Young, not below 0.

    Args:
      energies: ``sigma_i^2``, squared singular values of the weighted error, largest first, as many
        as the largest rank or all of them.
      total: their sum over all of them, the squared Frobenius norm.
      ranks: nonnegative.

    >>> tail_energies(np.array([4.0, 1.0]), 5.5, [0, 1, 2]).tolist()
    [5.5, 1.5, 0.5]
    """
    caught = np.concatenate([[0.0], np.cumsum(energies, dtype=np.float64)])
    kept = np.minimum(np.asarray(ranks, np.intp), len(energies))
    return np.asarray(total - caught[kept]).clip(min=0)


def _hull(candidates: Sequence[Candidate]) -> list[int]:
    """Indices of the lower convex hull, from the smallest candidate on, distortion falling."""
    hull: list[int] = []
    for at in sorted(range(len(candidates)), key=lambda i: candidates[i]):
        new = candidates[at]
        if hull and new.distortion >= candidates[hull[-1]].distortion:
            continue  # larger and no better
        while len(hull) > 1 and not _turns(candidates[hull[-2]], candidates[hull[-1]], new):
            hull.pop()
        hull.append(at)
    return hull


def _turns(first: Candidate, second: Candidate, third: Candidate) -> bool:
    """Whether the step from ``second`` to ``third`` gains less a byte than the one before it."""
    return (first.distortion - second.distortion) * (third.nbytes - second.nbytes) > (
        second.distortion - third.distortion
    ) * (second.nbytes - first.nbytes)


def _steps(
    items: Sequence[Sequence[Candidate]], hulls: Sequence[Sequence[int]]
) -> Iterator[tuple[int, int, Candidate]]:
    """Steps up the hulls, steepest first: item, new candidate, and bytes and gain of the step."""
    queue: list[tuple[float, int, int]] = []

    def step(item: int, place: int) -> Candidate:
        before, after = (items[item][hulls[item][at]] for at in (place - 1, place))
        return Candidate(after.nbytes - before.nbytes, before.distortion - after.distortion)

    def offer(item: int, place: int) -> None:
        if place < len(hulls[item]):
            nbytes, gain = step(item, place)
            heapq.heappush(queue, (-gain / nbytes, item, place))

    for item in range(len(items)):
        offer(item, 1)
    while queue:
        _, item, place = heapq.heappop(queue)
        yield item, hulls[item][place], step(item, place)
        offer(item, place + 1)


def _fill(items: Sequence[Sequence[Candidate]], chosen: list[int], left: int) -> int:
    """Spend ``left`` bytes on any step that still fits, steepest first; return the remainder."""
    while True:
        best: tuple[float, int, int] | None = None
        for item, candidates in enumerate(items):
            now = candidates[chosen[item]]
            for at, candidate in enumerate(candidates):
                gain, nbytes = now.distortion - candidate.distortion, candidate.nbytes - now.nbytes
                if gain <= 0 or nbytes > left:
                    continue
                # A candidate on the hull is never beaten by one that is no larger.
                steepness = gain / max(nbytes, 1)
                if best is None or steepness > best[0]:
                    best = (steepness, item, at)
        if best is None:
            return left
        _, item, at = best
        left -= items[item][at].nbytes - items[item][chosen[item]].nbytes
        chosen[item] = at


def _distortion(items: Sequence[Sequence[Candidate]], chosen: Sequence[int]) -> float:
    return float(sum(items[i][at].distortion for i, at in enumerate(chosen)))
