"""Progress of a build: phases with a known number of steps.

A phase is a context; the work inside calls :meth:`Phase.advance` once a step::

    with progress.phase("compress", len(groups)) as phase:
        for group in groups:
            ...
            phase.advance(f"block {group.block}")
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from typing_extensions import override

from eoracc.compiler.observe.spans import span, step
from eoracc.passes.progress import Phase
from eoracc.printable import escape_controls

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from rich.console import Console

    from eoracc.passes.base import Pass

__all__ = [
    "ConsoleProgress",
    "PassTimes",
    "PhaseTime",
    "SilentProgress",
]

_SPARSE_SECONDS = 10.0
"""Where no terminal shows a bar, at most one line per phase in so many seconds."""


@dataclass(frozen=True)
class PhaseTime:
    """Duration of one phase, or of one pass.

    Attributes:
      name: the phase.
      wall_s: seconds on the clock.
      cpu_s: seconds of processor time, all threads and children.
    """

    name: str
    wall_s: float
    cpu_s: float


class PassTimes:
    """Sums the time of every pass of a build, over all linear groups that it was called for."""

    def __init__(self) -> None:
        self._times: dict[int, PhaseTime] = {}

    @contextmanager
    def measure(self, layer_pass: Pass, on: str = "") -> Iterator[None]:
        """Add the time that the context takes to that of ``layer_pass``, known by identity.

        Args:
          layer_pass: a pass of any kind.
          on: the linears that it runs on.
        """
        before = self._times.get(id(layer_pass), PhaseTime(layer_pass.name, 0.0, 0.0))
        with span(layer_pass.name, "pass", linears=on) as took:
            yield
        self._times[id(layer_pass)] = PhaseTime(
            layer_pass.name, before.wall_s + took.wall_s, before.cpu_s + took.cpu_s
        )

    def times(self) -> list[PhaseTime]:
        """A time for each pass, in the order in which they were first called."""
        return list(self._times.values())


class _SilentPhase:
    def advance(self, note: str = "") -> None:
        del note

    def skip(self) -> None:
        pass


class _ToldPhase:
    """A phase whose steps the listeners of its span are told of."""

    def __init__(self, shown: Phase, name: str, total: int) -> None:
        self._shown, self._name, self._total = shown, name, total
        self._done = 0

    def advance(self, note: str = "") -> None:
        self._shown.advance(note)
        self._done += 1
        step(self._name, self._done, self._total, note)

    def skip(self) -> None:
        self._shown.skip()
        self._done += 1


class SilentProgress:
    """Shows nothing and only measures: for ``--json``, libraries and tests.

    Attributes:
      times: finished phases in order.
    """

    def __init__(self) -> None:
        self.times: list[PhaseTime] = []

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Phase]:
        """See :meth:`Progress.phase`."""
        with span(name, "phase", steps=total) as took, self._show(name, total) as phase:
            yield _ToldPhase(phase, name, total)
        self.times.append(PhaseTime(name, took.wall_s, took.cpu_s))

    def _show(self, name: str, total: int) -> AbstractContextManager[Phase]:
        del name, total
        return _Plain(_SilentPhase())


class ConsoleProgress(SilentProgress):
    """A rich bar with the time left on a terminal; a few plain lines anywhere else."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    @override
    def _show(self, name: str, total: int) -> AbstractContextManager[Phase]:
        if self._console.is_terminal:
            return _bar(self._console, name, total)
        return _lines(self._console, name, total)


class _Plain(AbstractContextManager[Phase]):
    """A context without an end of its own."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    @override
    def __enter__(self) -> Phase:
        return self._phase

    @override
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        return None


@contextmanager
def _bar(console: Console, name: str, total: int) -> Iterator[Phase]:
    from rich.progress import (  # noqa: PLC0415 - silent builds do without rich
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress  # noqa: PLC0415
    from rich.table import Column  # noqa: PLC0415

    columns = (
        TextColumn("{task.description:<12}", markup=False),
        BarColumn(bar_width=30, table_column=Column()),  # may wrap: on a narrow terminal it yields
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with RichProgress(*columns, console=console) as bars:
        task = bars.add_task(escape_controls(name), total=total, note="")

        class _Bar:
            skipped = 0

            def advance(self, note: str = "") -> None:
                bars.update(task, advance=1, note=escape_controls(note))

            def skip(self) -> None:
                # Without the samples that the time left is estimated from.
                self.skipped += 1
                bars.reset(task, completed=self.skipped)

        yield _Bar()
        bars.update(task, note="")


@contextmanager
def _lines(console: Console, name: str, total: int) -> Iterator[Phase]:
    start = time.monotonic()
    _say(console, f"{name}: {total} steps")

    class _Lines:
        done = skipped = 0
        shown = begun = start

        def advance(self, note: str = "") -> None:
            self.done += 1
            now = time.monotonic()
            if now - self.shown < _SPARSE_SECONDS or self.done >= total:
                return
            self.shown = now
            left = (now - self.begun) / (self.done - self.skipped) * (total - self.done)
            at = f" ({note})" if note else ""
            _say(console, f"{name}: {self.done}/{total}{at}, about {left:.0f} s left")

        def skip(self) -> None:
            self.done += 1
            self.skipped += 1
            self.begun = time.monotonic()

    yield _Lines()
    _say(console, f"{name}: done in {time.monotonic() - start:.1f} s")


def _say(console: Console, line: str) -> None:
    """Print a line as it is: names in it are of any origin."""
    console.print(escape_controls(line), highlight=False, markup=False)
