"""Silence for the libraries that read checkpoints: their bars and notes are not our output."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["quiet"]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Mute progress bars, log records below ERROR and warnings of everything called inside.

    Exceptions pass through: what went wrong is said by whoever catches them.
    """
    threshold = logging.root.manager.disable
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(threshold)
