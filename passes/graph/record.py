"""The record that passes keep of one linear, for the report."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["LinearRecord"]


@dataclass(eq=False)
class LinearRecord:
    """Errors and notes of one linear, as its passes recorded them.

    Attributes:
      errors: relative output error by pass, ``||(T - W_hat) X||_F / ||T X||_F``.
      notes: sentences for the report, about a fallback for example.
      output_norm: ``||T X||_F`` over the calibration tokens of this sweep, with the target ``T``
        of compression (the weight ``W``, or what matches outputs); None until a pass computes it.
    """

    errors: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    output_norm: float | None = None

    def copy(self) -> LinearRecord:
        """A record of the same content, to be changed on its own."""
        return LinearRecord(dict(self.errors), list(self.notes), self.output_norm)
