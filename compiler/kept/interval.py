"""How often the state of a long computation is saved."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["SaveInterval"]

_LEAST_S = 10.0
"""Least time between two saves. An interruption may cost a few seconds of work."""

_SHARE = 0.02
"""Greatest share of the time that goes into saving. Activations that take a minute to write and
flush are saved once in 50 minutes."""


class SaveInterval:
    """Tells when the next save is due: seldom where saving takes long."""

    def __init__(self) -> None:
        self._saved_s = time.monotonic()
        self._cost_s = 0.0

    @property
    def is_due(self) -> bool:
        """Whether enough time has passed since the last save."""
        passed_s = time.monotonic() - self._saved_s
        return passed_s >= max(_LEAST_S, self._cost_s / _SHARE)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Measure a save."""
        begun_s = time.monotonic()
        yield
        self._saved_s = time.monotonic()
        self._cost_s = self._saved_s - begun_s
