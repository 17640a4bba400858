"""Take the statistics that the solvers need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from typing_extensions import override

from eoracc.compiler.errors import PassError
from eoracc.passes.base import LayerPass, register
from eoracc.passes.gram import accumulate_gram

if TYPE_CHECKING:
    from eoracc.compiler.linears import LinearGroup

__all__ = ["Calibrate"]


@register
@dataclass(frozen=True, kw_only=True)
class Calibrate(LayerPass):
    """Take the Gram of every linear's input over the calibration text.

    Options:
      through: ``compressed`` takes each input through the prefix as it has been compressed so far,
        so that a layer makes up for what the ones before it lost; ``original`` takes it through
        the original weights.
    """

    name: ClassVar[str] = "calibrate"
    through: Literal["compressed", "original"] = "compressed"

    @override
    def requires(self, group: LinearGroup) -> None:
        if group.activations is None:
            raise PassError(group.name, "has no activations: give 'calibration' in model.yaml")

    @override
    def call(self, group: LinearGroup) -> bool:
        assert group.activations is not None  # noqa: S101 - requires() has checked
        group.gram = accumulate_gram(group.activations(), group.linears[0].in_features)
        # One bad value anywhere reaches the diagonal: no need to scan every activation.
        if not np.isfinite(np.diag(group.gram.matrix)).all():
            raise PassError(
                group.name,
                "its input over the calibration text holds NaN or Inf: "
                "the checkpoint or the text is damaged",
            )
        return True
