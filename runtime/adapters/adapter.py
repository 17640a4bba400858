"""An adapter: low-rank factors of one task, on top of a frozen backbone.

:mod:`eoracc.runtime.adapters.files` reads and writes its files, and
:mod:`eoracc.runtime.adapters.store` changes which adapters an artifact has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eoracc.errors import ArtifactError, PluginError
from eoracc.plugins.operands.low_rank import LowRank
from eoracc.printable import quoted
from eoracc.runtime.adapters.weighted_sum import weighted_sum

__all__ = ["Adapter", "check_adapter_name", "combine"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_RESERVED = "none"


@dataclass(frozen=True, eq=False)
class Adapter:
    """Low-rank factors of one task.

    Attributes:
      name: in the artifact, see :func:`check_adapter_name`.
      factors: by linear, named as in the checkpoint; linears without factors are left out.
      backbone: digest of its backbone, :attr:`Manifest.digest`.
      details: JSON values: origin, calibration text, figures.
    """

    name: str
    factors: Mapping[str, LowRank]
    backbone: str
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Largest rank of a linear."""
        return max((factors.rank for factors in self.factors.values()), default=0)

    @property
    def factor_types(self) -> tuple[str, ...]:
        """Types of the stored factors, usually one."""
        return tuple(sorted({factors.factor_type for factors in self.factors.values()}))

    @property
    def nbytes(self) -> int:
        """Bytes of all factors in the tiles of their linears."""
        return sum(factors.input_bytes for factors in self.factors.values())


def check_adapter_name(name: str) -> None:
    """Check the name of an adapter, which becomes part of paths, model names and graph feeds.

    Raises:
      ArtifactError: the name is not allowed.
    """
    if name == _RESERVED or not _NAME.fullmatch(name):
        raise ArtifactError(
            f"adapter {quoted(name)}: is no valid name: use up to 64 of a-z, 0-9, '.', '_' and "
            f"'-', the first a letter or digit; '{_RESERVED}' is reserved"
        )


def combine(terms: Sequence[tuple[Adapter, float]], name: str) -> Adapter:
    """Several adapters as one, whose factors are their weighted sum.

    Args:
      terms: adapters of one backbone with finite weights. Those of weight 0 add nothing.
      name: of the new adapter; it can be stored only if it passes :func:`check_adapter_name`.

    Returns:
      An adapter with the ranks of all terms together. Integer factors are rounded, see
      :func:`eoracc.runtime.adapters.weighted_sum.weighted_sum`.

    Raises:
      ArtifactError: there are no terms, a weight is not finite, or they are of several backbones.
    """
    if not terms:
        raise ArtifactError(f"adapter {quoted(name)}: is a sum of no adapters: give at least one")
    for adapter, weight in terms:
        if not math.isfinite(weight):
            raise ArtifactError(
                f"adapter {quoted(name)}: the weight of '{adapter.name}' is {weight}"
            )
    backbones = {adapter.backbone for adapter, _ in terms}
    if len(backbones) > 1:
        raise ArtifactError(
            f"adapter {quoted(name)}: is a sum of adapters of several backbones: "
            f"{', '.join(sorted(digest[:12] for digest in backbones))}"
        )
    by_linear: dict[str, list[tuple[LowRank, float]]] = {}
    for adapter, weight in terms:
        for linear, own in adapter.factors.items():
            by_linear.setdefault(linear, []).append((own, weight))
    try:
        factors = {linear: weighted_sum(parts) for linear, parts in by_linear.items()}
    except PluginError as error:
        raise ArtifactError(f"adapter {quoted(name)}: {error}") from error
    details = {"sum_of": [{"adapter": adapter.name, "weight": weight} for adapter, weight in terms]}
    return Adapter(name, factors, backbones.pop(), details)
