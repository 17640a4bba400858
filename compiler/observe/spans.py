"""Spans of a build: what runs, from when to when, told to whoever listens.

The times in report.json, the trace and the log all come from the same spans. Without listeners a
span costs two looks at the clock.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = ["Figure", "Kind", "Listener", "Span", "cpu_seconds", "listening", "span", "step", "warn"]

Kind = Literal["phase", "stage", "pass", "forward", "session"]

Figure = str | int | float | None


@dataclass(eq=False)
class Span:
    """Something that takes time.

    Attributes:
      name: what runs.
      kind: what kind of work it is.
      figures: what else is known of it.
      begun_s: by the clock of ``time.perf_counter``.
      wall_s: seconds on the clock; 0 until it has ended.
      cpu_s: seconds of processor time, all threads and children; 0 until it has ended.
      failed: name of the exception that ended it.
    """

    name: str
    kind: Kind
    figures: dict[str, Figure] = field(default_factory=dict)
    begun_s: float = 0.0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    failed: str | None = None


class Listener(Protocol):
    """Is told of spans, in the thread that they run in."""

    def begin(self, begun: Span) -> None:
        """A span begins."""

    def end(self, ended: Span) -> None:
        """A span has ended, by an exception or without; those inside it have ended before."""

    def step(self, phase: str, done: int, total: int, note: str) -> None:
        """One step of a phase is done."""

    def warn(
        self, code: str, message: str, linear: str | None, figures: Mapping[str, float]
    ) -> None:
        """A warning has been recorded."""


_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("_LISTENERS", default=())


def cpu_seconds() -> float:
    """Processor time of this process, all threads, and of the children it has waited for."""
    # `os.times` counts in steps of 10 ms.
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


@contextmanager
def listening(*listeners: Listener) -> Iterator[None]:
    """Tell ``listeners`` of all spans inside the context."""
    token = _LISTENERS.set((*_LISTENERS.get(), *listeners))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


@contextmanager
def span(name: str, kind: Kind, **figures: Figure) -> Iterator[Span]:
    """Measure the context; :class:`Span` has its times afterwards."""
    listeners = _LISTENERS.get()
    current = Span(name, kind, figures)
    cpu_s = cpu_seconds()
    current.begun_s = time.perf_counter()
    for listener in listeners:
        listener.begin(current)
    try:
        yield current
    except BaseException as error:
        current.failed = type(error).__name__
        raise
    finally:
        current.wall_s = time.perf_counter() - current.begun_s
        current.cpu_s = cpu_seconds() - cpu_s
        for listener in listeners:
            listener.end(current)


def step(phase: str, done: int, total: int, note: str) -> None:
    """Tell the listeners that a step of ``phase`` is done."""
    for listener in _LISTENERS.get():
        listener.step(phase, done, total, note)


def warn(code: str, message: str, linear: str | None, figures: Mapping[str, float]) -> None:
    """Tell the listeners of a warning."""
    for listener in _LISTENERS.get():
        listener.warn(code, message, linear, figures)
