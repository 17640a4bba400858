"""The progress of long work, as passes and the compiler show it; the compiler implements it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

__all__ = ["Phase", "Progress"]


class Phase(Protocol):
    """A running phase."""

    def advance(self, note: str = "") -> None:
        """One step is done; ``note`` names it, ``block 3``."""

    def skip(self) -> None:
        """One step was done by an earlier run: it says nothing about the time that is left."""


class Progress(Protocol):
    """Shows how far long work has come."""

    def phase(self, name: str, total: int) -> AbstractContextManager[Phase]:
        """Begin a phase of ``total`` steps; leaving the context ends it."""
