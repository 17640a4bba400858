"""Quantize and compensate by turns, each for what the other leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import Pass, Problem, register
from eoracc.passes.compensate.eora import Eora
from eoracc.passes.imported import Imported
from eoracc.passes.solvers.alternation import alternate
from eoracc.passes.statistics import record_error, require_gram, saw_too_few_tokens

if TYPE_CHECKING:
    from eoracc.passes.graph.linears import Linear, LinearGroup
    from eoracc.passes.solvers.gram import Gram
    from eoracc.passes.solvers.lost_output import LostOutput

__all__ = ["Caldera"]


@register
@dataclass(frozen=True, kw_only=True)
class Caldera(Eora):
    """Alternate between the weight's codes and its low-rank factors (arXiv:2405.18886).

    Begins where ``eora`` ends. Then the weight without what the factors give is quantized again,
    by the quantizing pass of the sweep and its options, and the factors are solved for again; the
    iterate that leaves the least output error is kept, so that it is never worse than ``eora`` with
    the same options. A linear whose input fewer than 32 calibration tokens reached is left to
    ``eora``.

    Options:
      iterations: how often to quantize again; 0 is ``eora``.
    """

    name: ClassVar[str] = "caldera"
    comparable = False  # its factors belong to the codes that it chooses with them

    iterations: Annotated[int, Field(ge=0)] = 4

    @override
    def problems(self, earlier: Sequence[Pass]) -> Iterator[Problem]:
        yield from super().problems(earlier)
        if any(isinstance(other, Imported) for other in earlier):
            yield (), "quantizes again what 'imported' has taken over: put 'eora' in its place"

    @override
    def requires(self, group: LinearGroup) -> None:
        super().requires(group)
        for linear in group.linears:
            if linear.factors is not None:
                raise PassError(
                    linear.name,
                    f"has factors already, while {self.name!r} solves for all of them together "
                    "with the weight: take the compensating pass before it away",
                )

    @override
    def call(self, group: LinearGroup) -> None:
        gram = require_gram(self.name, group)
        super().call(group)
        if saw_too_few_tokens(gram):
            return
        for options, linears in self.partition(group):
            for linear in linears:
                if linear.factors is not None and linear.quantizer is not None:
                    options.alternate(linear, gram)

    def alternate(self, linear: Linear, gram: Gram) -> None:
        """Improve on the codes and factors of one linear."""
        weight, quantizer = linear.compressed, linear.quantizer
        assert weight is not None  # noqa: S101 - it has factors
        assert quantizer is not None  # noqa: S101 - call() has checked
        lost = self.lost_output(linear, gram)
        best, _ = alternate(
            gram.target(linear.weight()),
            weight,
            quantize=lambda target: quantizer.requantize(target, gram),
            correct=lambda delta: self.solve(replace(lost, delta=delta, over_tokens=None)),
            measure=lambda delta: _size(replace(lost, delta=delta, over_tokens=None)),
            iterations=self.iterations,
        )
        if best.weight is weight:
            return
        linear.quantize(best.weight)
        linear.compensate(best.factors if best.factors.rank else None)
        record_error(self.name, linear, gram)


def _size(lost: LostOutput) -> float:
    """The norm of an error in the metric that its factors are solved in."""
    weighted = lost.weighted
    return float(
        np.linalg.norm(weighted if lost.output_root is None else lost.output_root @ weighted)
    )
