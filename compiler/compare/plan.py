"""Spend the budgets of ``eoracc compare`` on methods, from the shapes of linears alone.

A **budget** decides the open figure of a **method** (:mod:`eoracc.compiler.compare.methods`). Both
together are a **contender**.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eoracc.compiler.compare.methods import Method, with_options
from eoracc.compiler.compare.planned_bytes import (
    PLAIN_BYTES,
    planned_bytes,
    rank_limit,
    with_rank,
)
from eoracc.compiler.config.budget import budget_bits, budget_size
from eoracc.passes.base import Pass
from eoracc.passes.factorize.base import Factorization
from eoracc.passes.graph.linears import Linear
from eoracc.passes.plan.allocate import Allocate
from eoracc.passes.plan.select_last_k import SelectLastK
from eoracc.passes.recipe import Recipe

__all__ = ["BudgetProblem", "BuildBytes", "Contender", "Fit", "fit"]

_RATIO_STEPS = 1000
"""Ratios are multiples of a thousandth where factors are quantized, which has no closed form."""

_ROUNDING = 1 + 1e-9
"""Budgets are decimal fractions, which floating point rounds."""


class BudgetProblem(Exception):  # noqa: N818 - it ends a row of a table, not the command
    """A method cannot meet a budget; the message gives the reason in one sentence."""


@dataclass(frozen=True)
class Fit:
    """A method's passes at one budget.

    Attributes:
      passes: with all figures set.
      rank: of the last compensation, where the budget decided it.
      ratio: share of parameters that the factorisation removes, where the budget decided it.
    """

    passes: tuple[Pass, ...]
    rank: int | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Contender:
    """One method at one budget.

    Attributes:
      method: to try.
      budget: as the user gave it, ``3.5``, ``30%`` or ``90MB``; None for a method that takes none.
      fit: the passes; None where the budget cannot be met.
      problem: the reason.
    """

    method: Method
    budget: str | None
    fit: Fit | None
    problem: str | None = None


@dataclass(frozen=True)
class _Budget:
    """A budget for the weights of some linears.

    Attributes:
      bits: per weight.
      weights: number of weights.
    """

    bits: float
    weights: int

    @property
    def nbytes(self) -> float:
        """Bytes for all weights together."""
        return self.bits * self.weights / 8 * _ROUNDING

    def bits_per_weight(self, nbytes: int) -> float:
        """``nbytes`` for all weights in bits per weight."""
        return 8 * nbytes / self.weights


BuildBytes = Callable[[Sequence[Pass]], int]
"""Bytes of the folder that a build with these passes will write."""


def fit(method: Method, budget: str, linears: Sequence[Linear], folder_bytes: BuildBytes) -> Fit:
    """Spend ``budget`` on the passes of ``method``.

    Args:
      method: one that takes a budget.
      budget: in the form of :func:`~eoracc.compiler.config.budget.budget_bits`.
      linears: that a budget of weights is for, as they are before the passes.
      folder_bytes: by which a budget of the folder is spent.

    Raises:
      BudgetProblem: it is too small, or leaves nothing to do.
    """
    size = budget_size(budget)
    if size is not None:
        return _fit_folder(method.passes, size, linears, folder_bytes)
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    limit = _Budget(budget_bits(budget), weights)
    passes = method.passes
    if any(isinstance(item, Allocate) for item in passes):
        bits = {"bits_per_weight": limit.bits, "bytes": None, "size": None}
        return Fit(with_options(passes, Allocate, **bits))
    if Recipe(passes).compensations:
        return _fit_rank(passes, linears, limit)
    return _fit_ratio(passes, linears, limit)


def _fit_folder(
    passes: tuple[Pass, ...], size: int, linears: Sequence[Linear], folder_bytes: BuildBytes
) -> Fit:
    """Spend a budget of the folder, in which embedding and head count like all else."""
    if any(isinstance(item, Allocate) for item in passes):
        budget = {"bits_per_weight": None, "bytes": None, "size": size}
        return Fit(with_options(passes, Allocate, **budget))
    if Recipe(passes).compensations:
        ranks = range(rank_limit(passes, linears) + 1)
        rank = bisect_right(ranks, size, key=lambda at: folder_bytes(with_rank(passes, at))) - 1
        if rank < 0:
            least = folder_bytes(with_rank(passes, 0))
            raise BudgetProblem(f"the folder takes {least:,} bytes {_least(passes)}")
        return Fit(with_rank(passes, rank), rank=rank)
    ratio = _smallest_ratio(lambda at: folder_bytes(_at_ratio(passes, at)), size)
    least = folder_bytes(_at_ratio(passes, ratio))
    if least > size:
        raise BudgetProblem(f"the folder takes {least:,} bytes with the smallest factors")
    return Fit(_at_ratio(passes, ratio), ratio=ratio)


def _least(passes: Sequence[Pass]) -> str:
    """Which factors are there where the budget gives none."""
    several = len(Recipe(passes).compensations) > 1
    return "with the factors before the last compensation" if several else "without factors"


def _at_ratio(passes: Sequence[Pass], ratio: float) -> tuple[Pass, ...]:
    steered = with_options(passes, SelectLastK, ratio=ratio)
    return with_options(steered, Factorization, ratio=ratio)


def _fit_rank(passes: Sequence[Pass], linears: Sequence[Linear], budget: _Budget) -> Fit:
    """The largest rank of the last compensation that fits.

    It is the same for all linears without an override of their own.
    """

    def bytes_at(rank: int) -> int:
        return planned_bytes(with_rank(passes, rank), linears)

    ranks = range(rank_limit(passes, linears) + 1)
    rank = bisect_right(ranks, budget.nbytes, key=bytes_at) - 1
    if rank < 0:
        bits = budget.bits_per_weight(bytes_at(0))
        raise BudgetProblem(
            f"the quantized weights take {bits:.2f} bits per weight {_least(passes)}"
        )
    return Fit(with_rank(passes, rank), rank=rank)


def _fit_ratio(passes: Sequence[Pass], linears: Sequence[Linear], budget: _Budget) -> Fit:
    """The smallest share to remove that fits."""

    def bytes_at(ratio: float) -> int:
        return planned_bytes(_at_ratio(passes, ratio), linears)

    plain_bytes = PLAIN_BYTES * budget.weights
    if plain_bytes <= budget.nbytes:
        bits = budget.bits_per_weight(plain_bytes)
        raise BudgetProblem(f"it leaves nothing to remove: weights take {bits:g} bits as they are")
    if Recipe(passes).compression is not None:
        ratio = _smallest_ratio(bytes_at, budget.nbytes)
    else:
        # Rounded: 30% of 16 bits must be the ratio 0.3 of published tables.
        ratio = round(1 - budget.bits / (8 * PLAIN_BYTES), 12)
    if bytes_at(ratio) > budget.nbytes:
        bits = budget.bits_per_weight(bytes_at(1 - 1 / _RATIO_STEPS))
        raise BudgetProblem(f"the smallest factors take {bits:.2f} bits per weight")
    return Fit(_at_ratio(passes, ratio), ratio=ratio)


def _smallest_ratio(bytes_at: Callable[[float], int], nbytes: float) -> float:
    """The smallest ratio in steps of a thousandth that fits ``nbytes``, else the largest below 1.

    Args:
      bytes_at: bytes at a ratio, falling.
      nbytes: the limit.
    """
    steps = range(1, _RATIO_STEPS)
    position = bisect_left(steps, True, key=lambda step: bytes_at(step / _RATIO_STEPS) <= nbytes)
    return steps[min(position, len(steps) - 1)] / _RATIO_STEPS
