"""The methods that ``eoracc compare`` tries, each as a list of passes.

A **method** is a list of passes with one figure open, which a budget decides: the rank of a
compensation, the share of parameters that a factorisation removes, or the budget of a pass that
spends one itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from eoracc.compiler.config.contradictions import pass_problems
from eoracc.compiler.config.document import suggest
from eoracc.compiler.config.passes import method_names
from eoracc.compiler.config.sections import BuildConfig
from eoracc.compiler.config.yaml_tree import dotted
from eoracc.errors import ConfigError
from eoracc.passes.base import Pass, pass_type
from eoracc.passes.calibrate import Calibrate
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.compensate.quantize_factors import QuantizeFactors
from eoracc.passes.compression import Compression
from eoracc.passes.factorize.base import Factorization, RatioOverride
from eoracc.passes.plan.allocate import Allocate
from eoracc.passes.plan.select_last_k import SelectLastK
from eoracc.passes.recipe import Recipe
from eoracc.printable import quoted

__all__ = ["Family", "Method", "find_methods", "with_options"]

Family = Literal["quantization", "compensation", "factorization", "recipe"]

_NONE = "none"
"""The method that quantizes without compensation."""


@dataclass(frozen=True)
class Method:
    """A way of compressing.

    Attributes:
      name: in model.yaml or on the command line.
      family: its kind; ``recipe`` if model.yaml lists its passes.
      passes: the figure that a budget decides is still open.
    """

    name: str
    family: Family
    passes: tuple[Pass, ...]

    @property
    def takes_budget(self) -> bool:
        """Whether there is a figure that a budget can decide."""
        if any(isinstance(item, SelectLastK) and item.ratio is None for item in self.passes):
            return False  # it has a target of its own: average bits of the codes
        return any(
            isinstance(item, Allocate | Compensation | Factorization) for item in self.passes
        )


def find_methods(config: BuildConfig, names: Sequence[str]) -> list[Method]:
    """The methods called ``names``, each once.

    Args:
      config: model.yaml, with recipes of its own and the passes that built-in methods vary.
      names: of recipes, of compensating and factorising passes, or ``none``.

    Raises:
      ConfigError: there is no such method, or it does not fit the passes of ``config``.
    """
    recipes = {} if config.compare is None else config.compare.methods
    known = (*recipes, *(name for name in method_names() if name not in recipes))
    methods = []
    for name in dict.fromkeys(names):
        if name not in known:
            raise ConfigError(f"there is no method {quoted(name)}: {suggest(name, known)}")
        recipe = recipes.get(name)
        if recipe is None:
            method = _built_in(config.passes, name)
        else:
            method = Method(name, "recipe", tuple(recipe))
        for path, problem in pass_problems(config, method.passes):
            raise ConfigError(f"method {quoted(name)}: {dotted(path[1:])}: {problem}")
        methods.append(method)
    return methods


def with_options(passes: Sequence[Pass], kind: type[Pass], **options: object) -> tuple[Pass, ...]:
    """``passes``, those of ``kind`` with ``options``."""
    return tuple(
        replace(item, **options)  # type: ignore[type-var]
        if isinstance(item, kind)
        else item
        for item in passes
    )


def _built_in(passes: Sequence[Pass], name: str) -> Method:
    """The built-in method ``name`` as a variant of ``passes``."""
    kind = None if name == _NONE else pass_type(name)
    if kind is not None and issubclass(kind, Factorization):
        return Method(name, "factorization", _factorizing(passes, kind))
    if Recipe(passes).compression is None:
        raise ConfigError(
            f"method {quoted(name)}: there is nothing to compensate: put a quantize pass into "
            "'passes'"
        )
    if kind is None:
        return Method(name, "quantization", _quantizing(passes))
    assert issubclass(kind, Compensation)  # noqa: S101 - method_names() lists no others
    return Method(name, "compensation", _compensating(passes, kind))


def _quantizing(passes: Sequence[Pass]) -> tuple[Pass, ...]:
    """``passes`` without compensation."""
    return tuple(item for item in passes if not isinstance(item, Compensation | QuantizeFactors))


def _compensating(passes: Sequence[Pass], kind: type[Compensation]) -> tuple[Pass, ...]:
    """``passes`` with a compensation of ``kind`` in place of theirs, or after the compression.

    It keeps the factor type and the overrides of the compensation that it replaces.
    """
    present = Recipe(passes).compensations
    if present:
        old = present[0]
        position = passes.index(old)
        new = (
            old if type(old) is kind else kind(factor_type=old.factor_type, overrides=old.overrides)
        )
    else:
        position = 1 + max(i for i, item in enumerate(passes) if isinstance(item, Compression))
        new = kind()
    later = (item for item in passes[position:] if not isinstance(item, Compensation))
    return (*passes[:position], new, *later)


def _factorizing(passes: Sequence[Pass], kind: type[Factorization]) -> tuple[Pass, ...]:
    """The passes before any compression, then a factorisation of ``kind``.

    It takes over the options of such a pass in ``passes``, or skips the linears that their
    compressing pass skips.
    """
    changing = (i for i, item in enumerate(passes) if isinstance(item, Compression | Factorization))
    first = next(changing, len(passes))
    earlier = [item for item in passes[:first] if not isinstance(item, Allocate)]
    present = (item for item in passes if type(item) is kind)
    new = next(present, None) or kind(overrides=_skipping(passes))
    return (*with_options(earlier, Calibrate, **kind.calibrate_options), new)


def _skipping(passes: Sequence[Pass]) -> dict[str, RatioOverride]:
    """Overrides of a factorisation that skip the linears that the compressing pass skips."""
    compression = Recipe(passes).compression
    overrides = {} if compression is None else compression.overrides
    return {
        pattern: RatioOverride(skip=True) for pattern, options in overrides.items() if options.skip
    }
