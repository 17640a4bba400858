"""Admission of answers to the rows of the batch: first come, first served, the queue bounded."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from eoracc.runtime.server.api.errors import queue_full, queue_timeout

__all__ = ["Admission", "QueuePlace"]

_SMOOTHING = 0.2
_LONGEST_RETRY_S = 60


class Admission:
    """Rows of the engine's batch, and the queue before them.

    An answer takes a :class:`QueuePlace` when its request arrives, waits there for a row, and gives
    both back when it ends. Everything happens in the event loop's thread.

    Attributes:
      rows: answers that are generated at a time.
      max_waiting: answers that may wait.
      waiting: answers that are waiting.
      active: rows in use.
    """

    def __init__(self, rows: int, max_waiting: int) -> None:
        self.rows = rows
        self.max_waiting = max_waiting
        self.waiting = 0
        self.active = 0
        self._free = asyncio.Semaphore(rows)
        self._row_s = 1.0

    @property
    def size(self) -> int:
        """Answers that an idle server can admit."""
        return self.rows + self.max_waiting

    @property
    def room(self) -> int:
        """Answers that can still be admitted."""
        return self.size - self.waiting - self.active

    @property
    def retry_after_s(self) -> int:
        """Whole seconds until a row should be free for a new request."""
        seconds = self._row_s * (self.waiting + 1) / self.rows
        return min(max(math.ceil(seconds), 1), _LONGEST_RETRY_S)

    def check_room(self, count: int = 1) -> None:
        """Check that there is room for ``count`` answers.

        Raises:
          ApiError: 429, the queue is full.
        """
        if count > self.room:
            raise queue_full(self.waiting, self.retry_after_s)

    def enter(self, count: int) -> list[QueuePlace]:
        """Take ``count`` places, or none.

        Raises:
          ApiError: 429, the queue has no room for all of them.
        """
        self.check_room(count)
        return [QueuePlace(self) for _ in range(count)]

    @asynccontextmanager
    async def row(self, timeout_s: float) -> AsyncIterator[None]:
        """Wait for a row, then hold it.

        Raises:
          ApiError: 503, none became free in ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._free.acquire()
        except TimeoutError:
            raise queue_timeout(timeout_s, self.retry_after_s) from None
        self.active += 1
        begin = time.monotonic()
        try:
            yield
        finally:
            self.active -= 1
            self._free.release()
            self._row_s += _SMOOTHING * (time.monotonic() - begin - self._row_s)


class QueuePlace:
    """One answer's place in the queue, which ends when the answer gets a row or leaves."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._waits = True
        admission.waiting += 1

    def leave(self) -> None:
        """Leave the queue; has no effect the second time."""
        if self._waits:
            self._waits = False
            self._admission.waiting -= 1

    @asynccontextmanager
    async def row(self, timeout_s: float) -> AsyncIterator[None]:
        """Wait for a row, then hold it; see :meth:`Admission.row`."""
        try:
            async with self._admission.row(timeout_s):
                self.leave()
                yield
        finally:
            self.leave()
