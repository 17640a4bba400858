"""Take the statistics that the solvers need."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from eoracc.compiler.errors import PassError
from eoracc.passes.base import LayerPass, register
from eoracc.passes.gram import accumulate_gram

if TYPE_CHECKING:
    from types import ModuleType

    from eoracc.compiler.linears import LinearGroup
    from eoracc.compiler.products import Precision

__all__ = ["Calibrate"]


@register
@dataclass(frozen=True, kw_only=True)
class Calibrate(LayerPass):
    """Take the Gram of every linear's input over the calibration text.

    Options:
      through: ``compressed`` takes each input through the prefix as it has been compressed so far,
        so that a layer makes up for what the ones before it lost; ``original`` takes it through
        the original weights.
      precision: of the products of that forward pass and of the Gram's own. ``bfloat16`` rounds
        their operands to eight bits of mantissa and sums in float32; ``auto`` takes it where the
        processor has units for it (AMX), and ``float32`` elsewhere.
    """

    name: ClassVar[str] = "calibrate"
    through: Literal["compressed", "original"] = "compressed"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def resolved_precision(self) -> Precision:
        """What ``precision`` comes to on this machine."""
        if self.precision == "auto":
            return "bfloat16" if _products().bfloat16_is_fast() else "float32"
        return self.precision

    @override
    def requires(self, group: LinearGroup) -> None:
        if group.activations is None:
            raise PassError(group.name, "has no activations: give 'calibration' in model.yaml")

    @override
    def call(self, group: LinearGroup) -> bool:
        assert group.activations is not None  # noqa: S101 - requires() has checked
        gram = accumulate_gram(
            group.activations(),
            group.linears[0].in_features,
            add=_products().add_outer_products if self.resolved_precision == "bfloat16" else None,
        )
        group.gram = replace(gram, activations=group.activations)
        # One bad value anywhere reaches the diagonal: no need to scan every activation.
        if not np.isfinite(np.diag(group.gram.matrix)).all():
            raise PassError(
                group.name,
                "its input over the calibration text holds NaN or Inf: "
                "the checkpoint or the text is damaged",
            )
        return True


def _products() -> ModuleType:
    # Loads torch: a list of the passes, say, has no need of it.
    from eoracc.compiler import products  # noqa: PLC0415

    return products
