"""A trace of a build in the Trace Event Format, which Perfetto and chrome://tracing open.

The file is valid JSON after every event: each one is written over the closing brackets, with new
ones behind it, in a single call. So a trace of an interrupted or killed build can be opened.
"""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from eoracc.compiler.observe.spans import Span
from eoracc.errors import ConfigError
from eoracc.runtime.memory import resident_bytes

__all__ = ["Trace"]

_HEAD: Final = b'{"displayTimeUnit": "ms", "traceEvents": [\n'
_TAIL: Final = b"\n]}\n"

_LONGEST_NAME: Final = 200
"""Characters of a name: those of linears come from the checkpoint."""

_TASKS = Path("/proc/self/task")


class Trace:
    """A listener that writes spans, memory and threads to a file.

    ::

        with Trace(path) as trace, listening(trace):
            ...

    Attributes:
      path: the file.
      problem: why it is incomplete; None if it is complete.
    """

    def __init__(
        self,
        path: Path,
        *,
        most_events: int = 200_000,
        interval_s: float = 0.5,
        most_samples: int = 2000,
    ) -> None:
        """Open the file; the trace of an earlier build is replaced.

        Args:
          path: the file.
          most_events: events of passes, forward passes and sessions; later ones are left out.
          interval_s: between samples of memory and threads.
          most_samples: number of samples after which the interval doubles.

        Raises:
          ConfigError: the file cannot be written, or holds something else than a trace.
        """
        self.path = path
        self.problem: str | None = None
        self._left, self._left_out, self._broken = most_events, 0, False
        self._interval_s, self._most_samples = interval_s, most_samples
        self._lock, self._done = threading.Lock(), threading.Event()
        self._begun_s = time.perf_counter()
        self._shown: set[int] = set()
        self._end = len(_HEAD)
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)
            if os.pread(self._file, len(_HEAD), 0) not in (b"", _HEAD):
                os.close(self._file)
                raise ConfigError(
                    f"{path}: exists and is no trace: give --trace a new file, or remove this one"
                )
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, _HEAD + _TAIL, 0)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written: {error.strerror}: give --trace another file"
            ) from error
        self._sampler = threading.Thread(target=self._sample, name="trace", daemon=True)

    def __enter__(self) -> Self:
        self._sampler.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        self._sampler.join()
        if self._left_out:
            self.problem = f"{self._left_out} events are left out"
            self._write({"ph": "i", "s": "g", "name": self.problem, "ts": self._now()})
        os.close(self._file)

    def begin(self, begun: Span) -> None:
        """See :class:`.Listener`."""
        if begun.kind not in ("phase", "stage"):
            if self._left <= 0:
                self._left_out += 1
                return
            self._left -= 2
        self._shown.add(id(begun))
        self._write(
            {
                "ph": "B",
                "name": begun.name[:_LONGEST_NAME],
                "cat": begun.kind,
                "ts": self._now(begun.begun_s),
                "args": _args(begun.figures),
            }
        )

    def end(self, ended: Span) -> None:
        """See :class:`.Listener`."""
        if id(ended) not in self._shown:
            return
        self._shown.remove(id(ended))
        args: dict[str, Any] = {"cpu_s": round(ended.cpu_s, 6)}
        if ended.failed is not None:
            args["failed"] = ended.failed
        at = self._now(ended.begun_s + ended.wall_s)
        self._write({"ph": "E", "cat": ended.kind, "ts": at, "args": args})

    def step(self, phase: str, done: int, total: int, note: str) -> None:
        """See :class:`.Listener`; a trace shows the passes of a step."""

    def warn(
        self, code: str, message: str, linear: str | None, figures: Mapping[str, float]
    ) -> None:
        """See :class:`.Listener`."""
        if self._left <= 0:
            self._left_out += 1
            return
        self._left -= 1
        args = _args({"message": message, "linear": linear, **figures})
        self._write(
            {"ph": "i", "s": "t", "name": code, "cat": "warning", "ts": self._now(), "args": args}
        )

    def _now(self, at_s: float | None = None) -> float:
        """Microseconds since the trace was opened."""
        seconds = time.perf_counter() if at_s is None else at_s
        return round(1e6 * (seconds - self._begun_s), 1)

    def _write(self, event: Mapping[str, Any]) -> None:
        place = {"pid": os.getpid(), "tid": threading.get_native_id()}
        text = json.dumps({**event, **place}).encode()
        with self._lock:
            if self._broken:
                return
            written = text if self._end == len(_HEAD) else b",\n" + text
            try:
                if os.pwrite(self._file, written + _TAIL, self._end) < len(written + _TAIL):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError as error:
                # The build goes on, and the file ends with the last event.
                self._broken, self.problem = True, f"cannot be written: {error.strerror}"
                os.ftruncate(self._file, self._end)
                os.pwrite(self._file, _TAIL, self._end)
            else:
                self._end += len(written)

    def _sample(self) -> None:
        samples = 0
        while True:
            memory = {"resident_mb": round(resident_bytes() / 1e6, 1)}
            self._write({"ph": "C", "name": "memory", "ts": self._now(), "args": memory})
            threads = {"threads": _thread_count()}
            self._write({"ph": "C", "name": "threads", "ts": self._now(), "args": threads})
            samples += 1
            if samples % self._most_samples == 0:
                self._interval_s *= 2
            if self._done.wait(self._interval_s):
                return


def _thread_count() -> int:
    """Threads of this process, those of libraries included where Linux counts them."""
    return len(list(_TASKS.iterdir())) if _TASKS.exists() else threading.active_count()


def _args(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value[:_LONGEST_NAME] if isinstance(value, str) else value
        for name, value in figures.items()
    }
