"""The record that passes keep of one linear, for the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["LinearRecord", "LinearWarning"]


@dataclass(frozen=True, kw_only=True)
class LinearWarning:
    """Something about one linear that its user should know.

    Attributes:
      code: kind of warning, ``few_tokens``.
      message: a sentence about the linear, without its name.
      figures: numbers behind it, by name.
    """

    code: str
    message: str
    figures: Mapping[str, float]


@dataclass(eq=False)
class LinearRecord:
    """Errors, notes and warnings of one linear, as its passes recorded them.

    Attributes:
      errors: relative output error by pass, ``||(T - W_hat) X||_F / ||T X||_F``.
      notes: sentences for the report, about a fallback for example.
      output_norm: ``||T X||_F`` over the calibration tokens of this sweep, with the target ``T``
        of compression (the weight ``W``, or what matches outputs); None until a pass computes it.
      warnings: one of each code at most.
      sparsity: share of zeros in the weight that a pruning pass has left; None where none has.
    """

    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    output_norm: float | None = None
    warnings: list[LinearWarning] = field(default_factory=list)
    sparsity: float | None = None

    def warn(self, warning: LinearWarning) -> None:
        """Add ``warning``, in place of one of the same code: a later sweep knows better."""
        self.warnings = [known for known in self.warnings if known.code != warning.code]
        self.warnings.append(warning)

    def copy(self) -> LinearRecord:
        """A record of the same content, to be changed on its own."""
        return LinearRecord(
            dict(self.errors),
            list(self.notes),
            self.output_norm,
            list(self.warnings),
            self.sparsity,
        )
