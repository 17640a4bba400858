"""Factorise towards the original model's outputs, by as much as truncation gains from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import numpy as np
from pydantic import Field
from typing_extensions import override

from eoracc.errors import PassError
from eoracc.passes.base import register
from eoracc.passes.factorize.activation_aware import ActivationAwareFactorization
from eoracc.passes.solvers.factorization import saes_factors
from eoracc.passes.solvers.factors import gram_root

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.passes.graph.linears import LinearGroup
    from eoracc.passes.solvers.gram import Gram

__all__ = ["SaesSvd"]


@register
@dataclass(frozen=True, kw_only=True)
class SaesSvd(ActivationAwareFactorization):
    """Replace weights by products that undo some of what the compressed prefix has lost.

    SAES-SVD, arXiv:2602.03051. Needs ``calibrate: {match: outputs}``, whose statistics tell the
    original model's inputs from those behind the compressed prefix. Recorded errors are relative
    to the target of 'calibrate', which is that of ``beta: 1``.

    Options:
      beta: 0 comes near the weight, 1 near the original model's output; null chooses for each
        linear what truncation loses the least share of.
    """

    name: ClassVar[str] = "saes_svd"
    calibrate_options: ClassVar[Mapping[str, str]] = {"match": "outputs", "through": "compressed"}

    beta: Annotated[float, Field(ge=0, le=1)] | None = None

    @override
    def requires(self, group: LinearGroup) -> None:
        super().requires(group)
        if group.originals is None:
            raise PassError(
                group.name,
                f"{self.name!r} has no inputs of the original model to go by: "
                "give 'calibrate' before it the option 'match: outputs'",
            )

    @override
    def target(self, weight: NDArray[np.float32], gram: Gram | None) -> NDArray[np.float32]:
        return weight

    @override
    def factors(
        self, weight: NDArray[np.float32], gram: Gram, rank: int
    ) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        drift = gram.target(weight) - weight
        u, v, _ = saes_factors(weight, drift, gram_root(gram.matrix), rank, beta=self.beta)
        return u, v
