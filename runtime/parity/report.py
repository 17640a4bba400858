"""The report of a parity check: deviations from the record, and whether they are tolerable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from eoracc.errors import ArtifactError
from eoracc.printable import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.runtime.parity.record import ParityCase

__all__ = ["CaseParity", "LinearParity", "ParityReport", "compare_logits"]


@dataclass(frozen=True)
class LinearParity:
    """The linear with the largest share of its tolerance.

    Attributes:
      through: ``library`` or ``function``.
      linears: number of linears checked.
      worst: name of the linear with the largest share.
      tolerance_share: its largest deviation as a share of the tolerance; at most 1 passes. Up to
        0.11 of it is the coding of outputs (:mod:`eoracc.runtime.parity.linear_codes`).
      passed: whether all linears are within their tolerances.
    """

    through: str
    linears: int
    worst: str
    tolerance_share: float
    passed: bool


@dataclass(frozen=True)
class CaseParity:
    """Deviation of the logits for one way of calling the model.

    Attributes:
      through: ``library`` or ``function``, or the target whose graph it is.
      name: of the case.
      max_error: largest deviation of a logit.
      tolerance: largest allowed deviation.
      passed: whether all logits are within it.
    """

    through: str
    name: str
    max_error: float
    tolerance: float
    passed: bool


@dataclass(frozen=True)
class ParityReport:
    """Result of the parity gate.

    Attributes:
      passed: whether every check passed.
      linears: by ``through``.
      logits: by way of calling the model.
      compression_effect: see :class:`ParityRecord`.
    """

    passed: bool
    linears: tuple[LinearParity, ...]
    logits: tuple[CaseParity, ...]
    compression_effect: float

    def as_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> ParityReport:
        """Inverse of :meth:`as_dict`."""
        return cls(
            passed=content["passed"],
            linears=tuple(LinearParity(**figure) for figure in content["linears"]),
            logits=tuple(CaseParity(**figure) for figure in content["logits"]),
            compression_effect=content["compression_effect"],
        )


def compare_logits(
    case: ParityCase, logits: NDArray[np.float32], *, through: str, tolerance: float
) -> CaseParity:
    """Compare the logits of a call with the record; NaN is never within ``tolerance``.

    Args:
      case: the call.
      logits: of the call, ``float32 [B, S, V]``.
      through: what computed them, for the report.
      tolerance: largest allowed deviation of a logit.

    Raises:
      ArtifactError: the model has another vocabulary than the record.
    """
    of_tokens = logits[case.rows, case.columns]
    if of_tokens.shape[-1] != case.kept.size:
        raise ArtifactError(
            f"case {printable(case.name)}: the model gives {of_tokens.shape[-1]} logits for a "
            f"token, its record has {case.kept.size}: build the artifact again"
        )
    error = np.abs(case.kept_logits(of_tokens) - case.logits).max()
    return CaseParity(
        through=through,
        name=case.name,
        max_error=float(error),
        tolerance=tolerance,
        passed=bool(error <= tolerance),
    )
