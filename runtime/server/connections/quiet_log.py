"""The log of a server, which no client can make grow without bound."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from typing_extensions import override

from eoracc.log_lines import LogFormat, log_lines

__all__ = ["ACCESS_LOGGER", "LineBudget", "RepeatFilter", "set_up_logging"]

ACCESS_LOGGER = "eoracc.access"

_WINDOW_S = 60.0
_MOST_KINDS = 100
_LINES_PER_S = 100.0
_BURST = 6000


def set_up_logging(form: LogFormat = "text", *, access_log: bool = True) -> None:
    """Log on standard error: requests, unless ``access_log`` is False, and everything else."""
    requests = logging.StreamHandler(sys.stderr)
    requests.setFormatter(log_lines(form))
    requests.addFilter(LineBudget(_LINES_PER_S, _BURST))
    access = logging.getLogger(ACCESS_LOGGER)
    access.handlers = [requests] if access_log else []
    access.propagate = False
    access.setLevel(logging.INFO if access_log else logging.CRITICAL)
    others = logging.StreamHandler(sys.stderr)
    others.setFormatter(log_lines(form))
    others.addFilter(RepeatFilter())
    for name, level in (
        ("eoracc.server", logging.INFO),
        ("uvicorn.error", logging.WARNING),
        ("asyncio", logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers = [others]
        logger.propagate = False
        logger.setLevel(level)


class _Kind(NamedTuple):
    """What records have in common that count as repetitions of one message."""

    logger: str
    template: str
    error: str


_OTHERS = _Kind("", "", "")


class RepeatFilter(logging.Filter):
    """Lets a message through once a minute, with the number of those left out before.

    Messages are equal if their text before formatting, and the place where their exception comes
    from, are. More than a hundred kinds in a minute count as one.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start with an empty memory; ``clock`` returns seconds."""
        super().__init__()
        self._clock = clock
        self._begun: dict[_Kind, float] = {}
        self._omitted: dict[_Kind, int] = {}

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        kind = _kind(record)
        if kind not in self._begun and len(self._begun) >= _MOST_KINDS:
            self._forget_old(now)
            if len(self._begun) >= _MOST_KINDS:
                kind = _OTHERS
        if now - self._begun.get(kind, now - _WINDOW_S) < _WINDOW_S:
            self._omitted[kind] = self._omitted.get(kind, 0) + 1
            return False
        self._begun[kind] = now
        omitted = self._omitted.pop(kind, 0)
        if omitted:
            record.msg = f"{record.getMessage()} (and {omitted} more like this before)"
            record.args = ()
        return True

    def _forget_old(self, now: float) -> None:
        for kind, begun in list(self._begun.items()):
            if now - begun >= _WINDOW_S and kind not in self._omitted:
                del self._begun[kind]


def _kind(record: logging.LogRecord) -> _Kind:
    error = record.exc_info[1] if record.exc_info else None
    place = ""
    if error is not None:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        line = "" if trace is None else f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}"
        place = f"{type(error).__name__} {line}"
    return _Kind(record.name, str(record.msg), place)


class LineBudget(logging.Filter):
    """Lets through so many lines a second on average.

    The next line that passes gets a field with the number of those left out before: ``omitted``.
    """

    def __init__(
        self, per_second: float, burst: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start with a full budget.

        Args:
          per_second: lines that the budget regains.
          burst: most lines that the budget holds.
          clock: returns seconds.
        """
        super().__init__()
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._left = float(burst)
        self._last = clock()
        self._omitted = 0

    @override
    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        self._left = min(self._left + (now - self._last) * self._per_second, self._burst)
        self._last = now
        if self._left < 1:
            self._omitted += 1
            return False
        self._left -= 1
        if self._omitted:
            fields = getattr(record, "fields", {"message": record.getMessage()})
            record.fields = {**fields, "omitted": self._omitted}
            self._omitted = 0
        return True
