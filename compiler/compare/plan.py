"""What ``eoracc compare`` is to try: each method's passes, with each budget spent on them.

A **method** is a list of passes with one figure left open: the rank of a compensation, the share of
parameters that a factorisation removes, or the budget of a pass that spends one itself. A
**budget** decides it. Both together are a **contender**.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eoracc.compiler.compare.planned_bytes import (
    PLAIN_BYTES,
    planned_bytes,
    rank_limit,
)
from eoracc.compiler.config.budget import budget_bits
from eoracc.compiler.config.contradictions import pass_problems
from eoracc.compiler.config.document import dotted, suggest
from eoracc.compiler.config.passes import method_names
from eoracc.compiler.config.sections import BuildConfig
from eoracc.errors import ConfigError
from eoracc.passes.base import Pass, pass_type
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.compression import Compression
from eoracc.passes.factorize.base import Factorization, RatioOverride
from eoracc.passes.graph.linears import Linear
from eoracc.passes.plan.allocate import Allocate
from eoracc.passes.plan.select_last_k import SelectLastK
from eoracc.passes.recipe import Recipe

__all__ = ["BudgetProblem", "Contender", "Family", "Fit", "Method", "find_methods", "fit"]

Family = Literal["quantization", "compensation", "factorization", "recipe"]

_NONE = "none"
"""The method that quantizes and compensates for nothing."""

_RATIO_STEPS = 1000
"""Ratios are chosen to a thousandth where factors are quantized: no closed form holds there."""

_ROUNDING = 1 + 1e-9
"""Budgets are decimal fractions, which floating point rounds."""


class BudgetProblem(Exception):  # noqa: N818 - it ends a row of a table, not the command
    """A budget that a method cannot keep to, and why, in one sentence."""


@dataclass(frozen=True)
class Method:
    """A way of compressing.

    Attributes:
      name: as model.yaml or the command line has it.
      family: what it is; ``recipe`` for a list of passes that model.yaml gives it.
      passes: with the figure that a budget decides still open.
    """

    name: str
    family: Family
    passes: tuple[Pass, ...]

    @property
    def takes_budget(self) -> bool:
        """Whether there is a figure that a budget can decide."""
        if any(isinstance(item, SelectLastK) and item.ratio is None for item in self.passes):
            return False  # bits on average: how many that comes to, no shape tells
        return any(isinstance(p, Allocate | Compensation | Factorization) for p in self.passes)


@dataclass(frozen=True)
class Fit:
    """A method's passes at one budget.

    Attributes:
      passes: with every figure in place.
      rank: of the compensation, where the budget decided that.
      ratio: share of parameters that the factorisation removes, where the budget decided that.
    """

    passes: tuple[Pass, ...]
    rank: int | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Contender:
    """One method at one budget.

    Attributes:
      method: what is tried.
      budget: as the user gave it, ``3.5`` or ``30%``; None for a method that takes none.
      fit: how the budget is spent; None where it cannot be kept.
      problem: why it cannot.
    """

    method: Method
    budget: str | None
    fit: Fit | None
    problem: str | None = None


def find_methods(config: BuildConfig, names: Sequence[str]) -> list[Method]:
    """The methods called ``names``.

    Raises:
      ConfigError: there is no such method, or the passes of ``config`` have no place for it.
    """
    recipes = {} if config.compare is None else config.compare.methods
    known = (*recipes, *(name for name in method_names() if name not in recipes))
    methods = []
    for name in dict.fromkeys(names):
        if name not in known:
            raise ConfigError(f"there is no method {name!r}: {suggest(name, known)}")
        recipe = recipes.get(name)
        method = (
            _built_in(config, name) if recipe is None else Method(name, "recipe", tuple(recipe))
        )
        for place, problem in pass_problems(config, method.passes):
            raise ConfigError(f"method {name!r}: {dotted(place[1:])}: {problem}")
        methods.append(method)
    return methods


def fit(method: Method, budget: str, linears: Sequence[Linear]) -> Fit:
    """Spend ``budget`` on the passes of ``method``.

    Args:
      method: one that takes a budget.
      budget: as :func:`~eoracc.compiler.config.budget.budget_bits` reads it.
      linears: that the budget is for, as they stand before the passes.

    Raises:
      BudgetProblem: it is too small, or leaves nothing to do.
    """
    bits = budget_bits(budget)
    weights = sum(linear.out_features * linear.in_features for linear in linears)
    nbytes = bits * weights / 8 * _ROUNDING
    passes = method.passes
    if any(isinstance(item, Allocate) for item in passes):
        return Fit(_with(passes, Allocate, bits_per_weight=bits, bytes=None))
    if any(isinstance(item, Compensation) for item in passes):
        return _fit_rank(passes, linears, nbytes, weights)
    return _fit_ratio(passes, linears, bits, nbytes, weights)


# --- methods --------------------------------------------------------------------------------------


def _built_in(config: BuildConfig, name: str) -> Method:
    """The method of that name, put into the passes of ``config``."""
    passes = [item for item in config.passes if name != _NONE or not isinstance(item, Compensation)]
    compressed = [i for i, item in enumerate(passes) if isinstance(item, Compression)]
    kind = None if name == _NONE else pass_type(name)
    if kind is not None and issubclass(kind, Factorization):
        return Method(name, "factorization", _factorizing(passes, kind))
    if not compressed:
        raise ConfigError(
            f"method {name!r}: there is nothing to compensate: put a quantize pass into 'passes'"
        )
    if kind is None:
        without = [item for item in passes if not isinstance(item, QuantizeFactors)]
        return Method(name, "quantization", tuple(without))
    assert issubclass(kind, Compensation)  # noqa: S101 - method_names() lists no others
    present = [i for i, item in enumerate(passes) if isinstance(item, Compensation)]
    place = present[0] if present else compressed[-1] + 1
    new = kind()
    if present:
        old = passes[place]
        assert isinstance(old, Compensation)  # noqa: S101 - found as one
        new = (
            old
            if type(old) is kind
            else replace(new, factor_type=old.factor_type, overrides=old.overrides)
        )
    kept = [item for item in passes[place:] if not isinstance(item, Compensation)]
    return Method(name, "compensation", (*passes[:place], new, *kept))


def _factorizing(passes: Sequence[Pass], kind: type[Factorization]) -> tuple[Pass, ...]:
    """``passes`` with a factorisation in place of all that compresses, what steers it included."""
    begin = next(
        (i for i, item in enumerate(passes) if isinstance(item, Compression | Factorization)),
        len(passes),
    )
    kept = [item for item in passes[:begin] if not isinstance(item, Allocate)]
    same = next((item for item in passes if type(item) is kind), None)
    new = kind(overrides=_left_out(passes)) if same is None else same
    return (*_with(kept, Calibrate, **kind.calibrate_options), new)


def _left_out(passes: Sequence[Pass]) -> Mapping[str, RatioOverride]:
    """Overrides that skip the linears that the compressing pass skips."""
    compression = Recipe(passes).compression
    overrides = {} if compression is None else compression.overrides
    return {
        pattern: RatioOverride(skip=True) for pattern, options in overrides.items() if options.skip
    }


# --- budgets --------------------------------------------------------------------------------------


def _fit_rank(
    passes: Sequence[Pass], linears: Sequence[Linear], nbytes: float, weights: int
) -> Fit:
    """The largest rank that fits, the same for all linears that have none of their own."""

    def at(rank: int) -> tuple[Pass, ...]:
        return _with(passes, Compensation, rank=rank)

    def needed(rank: int) -> int:
        return planned_bytes(at(rank), linears)

    ranks = range(rank_limit(passes, linears) + 1)
    rank = bisect_right(ranks, nbytes, key=needed) - 1
    if rank < 0:
        raise BudgetProblem(
            f"the quantized weights alone take {8 * needed(0) / weights:.2f} bits per weight"
        )
    return Fit(at(rank), rank=rank)


def _fit_ratio(
    passes: Sequence[Pass], linears: Sequence[Linear], bits: float, nbytes: float, weights: int
) -> Fit:
    """The least share to remove that fits."""

    def at(ratio: float) -> tuple[Pass, ...]:
        return _with(_with(passes, Factorization, ratio=ratio), SelectLastK, ratio=ratio)

    def needed(ratio: float) -> int:
        return planned_bytes(at(ratio), linears)

    plain = sum(PLAIN_BYTES * one.out_features * one.in_features for one in linears)
    if plain <= nbytes:
        raise BudgetProblem(
            f"it leaves nothing to remove: weights take {8 * plain / weights:g} bits as they are"
        )
    if Recipe(passes).compression is not None:
        steps = range(1, _RATIO_STEPS)
        found = bisect_left(steps, True, key=lambda step: needed(step / _RATIO_STEPS) <= nbytes)
        ratio = steps[min(found, len(steps) - 1)] / _RATIO_STEPS
    else:
        # Rounded: 30% of 16 bits must be the ratio 0.3 that published tables have.
        ratio = round(1 - bits / (8 * PLAIN_BYTES), 12)
    if needed(ratio) > nbytes:
        raise BudgetProblem(
            f"the smallest factors take {8 * needed(1 - 1 / _RATIO_STEPS) / weights:.2f} "
            "bits per weight"
        )
    return Fit(at(ratio), ratio=ratio)


def _with(passes: Sequence[Pass], kind: type[Pass], **options: object) -> tuple[Pass, ...]:
    """``passes`` with ``options`` for those of ``kind``."""
    return tuple(
        replace(item, **options)  # type: ignore[type-var]
        if isinstance(item, kind)
        else item
        for item in passes
    )
