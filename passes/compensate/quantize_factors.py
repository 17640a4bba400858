"""Round low-rank factors that are there to 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import LayerPass, Pass, Problem, register
from eoracc.passes.compensate.base import Compensation
from eoracc.passes.overrides import Overridable, Override
from eoracc.passes.solvers.factor_types import FactorType, store_factors
from eoracc.passes.statistics import lost_output, record_error, saw_too_few_tokens

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram

__all__ = ["FactorBits", "FactorBitsOverride", "QuantizeFactors"]

FactorBits = Literal[4, 8]
"""Width of a factor's code."""

_TYPES: Mapping[int, FactorType] = {4: "int4", 8: "int8"}


@dataclass(frozen=True, kw_only=True)
class FactorBitsOverride(Override):
    """What the pass may do differently for some linears."""

    bits: FactorBits | None = None


@register
@dataclass(frozen=True, kw_only=True)
class QuantizeFactors(Overridable, LayerPass):
    """Round the low-rank factors of compensated linears to 8 or 4 bits, with a scale a row.

    The same as ``factor_type`` of the compensating pass, as a step of its own with its own line in
    the report: what rounding cost shows between the two. At 4 bits ``lora_b`` is solved for again
    against the rounded ``lora_a``, by the calibration tokens where there are any.

    Options:
      bits: of a factor's code.
    """

    name: ClassVar[str] = "quantize_factors"
    needs = (Compensation,)
    not_planned: ClassVar[frozenset[str]] = frozenset({"bits"})
    bits: FactorBits = 8
    overrides: Mapping[str, FactorBitsOverride] = field(default_factory=dict)

    @property
    def factor_type(self) -> FactorType:
        """What the factors are stored in afterwards."""
        return _TYPES[self.bits]

    @override
    def problems(self, earlier: Sequence[Pass]) -> Iterator[Problem]:
        yield from super().problems(earlier)
        last = next((other for other in reversed(earlier) if isinstance(other, Compensation)), None)
        if last is not None and last.factor_type == "int4" and self.bits > 4:
            yield (
                (),
                (
                    f"factors of '{last.name}' have 4 bits already: give it "
                    "'factor_type: float16', or leave this pass out"
                ),
            )

    @override
    def requires(self, group: LinearGroup) -> None:
        for options, linears in self.partition(group):
            for linear in linears:
                if linear.factors is not None and linear.factors.bits < options.bits:
                    raise PassError(
                        linear.name,
                        f"its factors have {linear.factors.bits} bits already: "
                        f"{self.name!r} cannot give it {options.bits}; give the compensating pass "
                        "'factor_type: float16'",
                    )

    @override
    def call(self, group: LinearGroup) -> None:
        for options, linears in self.partition(group):
            for linear in linears:
                options.round(linear, group.gram)

    def round(self, linear: Linear, gram: Gram | None) -> None:
        """Round the factors of one linear, unless they have that type already."""
        factors = linear.factors
        if factors is None or factors.factor_type == self.factor_type:
            return
        metric = None if gram is None or saw_too_few_tokens(gram) else gram
        weighted: NDArray[np.float32] | None = None
        if metric is not None and linear.source is not None:
            weighted = lost_output(linear, metric).weighted
        linear.compensate(
            store_factors(
                factors.up().astype(np.float64),
                factors.down().astype(np.float64),
                self.factor_type,
                gram=metric,
                weighted=weighted,
            )
        )
        if gram is not None:
            record_error(self.name, linear, gram)
