"""A weight that somebody else has compressed, as a linear takes it over."""

from __future__ import annotations

from dataclasses import dataclass

from eoracc.plugins.operands.dense import StoredWeight

__all__ = ["ImportedWeight"]


@dataclass(frozen=True, eq=False)
class ImportedWeight:
    """A weight of another checkpoint, with exactly the values that it has there.

    Attributes:
      weight: in codes where the op can hold those of the checkpoint, else in floats.
      dequantized: why the codes of the checkpoint became floats, a part of a sentence; empty where
        they were kept, and for a weight that had none.
    """

    weight: StoredWeight
    dequantized: str = ""
