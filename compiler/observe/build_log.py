"""The log of a build as JSON lines: phases, steps, stages, warnings and the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TextIO

from eoracc.errors import EoraccError
from eoracc.log_lines import log_lines

if TYPE_CHECKING:
    from eoracc.compiler.observe.spans import Span

__all__ = ["BuildLog", "build_log"]

_STEP_INTERVAL_S: Final = 1.0
"""Least time between two records of steps."""


class BuildLog:
    """A listener that writes records."""

    def __init__(self, logger: logging.Logger) -> None:
        """Begin a log.

        Args:
          logger: given the records.
        """
        self._logger = logger
        self._stepped_s = 0.0

    def begin(self, begun: Span) -> None:
        """See :class:`.Listener`."""
        if begun.kind in ("phase", "stage"):
            self._record(
                logging.INFO, f"{begun.kind}_begin", {"stage": begun.name, **begun.figures}
            )

    def end(self, ended: Span) -> None:
        """See :class:`.Listener`."""
        if ended.kind not in ("phase", "stage"):
            return
        fields: dict[str, Any] = {"stage": ended.name, "wall_s": round(ended.wall_s, 3)}
        fields["cpu_s"] = round(ended.cpu_s, 3)
        if ended.failed is not None:
            fields["failed"] = ended.failed
        self._record(logging.INFO, f"{ended.kind}_end", fields)

    def step(self, phase: str, done: int, total: int, note: str) -> None:
        """See :class:`.Listener`."""
        now_s = time.monotonic()
        if done < total and now_s - self._stepped_s < _STEP_INTERVAL_S:
            return
        self._stepped_s = now_s
        fields = {"stage": phase, "done": done, "total": total}
        self._record(logging.INFO, "step", fields | ({"note": note} if note else {}))

    def warn(
        self, code: str, message: str, linear: str | None, figures: Mapping[str, float]
    ) -> None:
        """See :class:`.Listener`."""
        fields = {"code": code, "linear": linear, "message": message, "figures": dict(figures)}
        self._record(logging.WARNING, "warning", fields)

    def _record(self, level: int, event: str, fields: Mapping[str, Any]) -> None:
        self._logger.log(level, event, extra={"fields": {"event": event, **fields}})


@contextmanager
def build_log(stream: TextIO) -> Iterator[BuildLog]:
    """A log on ``stream`` as JSON lines; the last record says how the context ended."""
    logger = logging.getLogger("eoracc.build")
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log_lines("json"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def end(level: int, fields: Mapping[str, Any]) -> None:
        logger.log(level, "end", extra={"fields": {"event": "end", **fields}})

    try:
        yield BuildLog(logger)
    except EoraccError as error:
        end(logging.ERROR, {"failed": type(error).__name__, "message": str(error)})
        raise
    except BaseException as error:
        end(logging.ERROR, {"failed": type(error).__name__})
        raise
    else:
        end(logging.INFO, {})
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
