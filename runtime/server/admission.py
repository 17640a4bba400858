"""Who may use a row of the batch, and who waits: first come, first served, and never too many."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from eoracc.runtime.server.errors import queue_full, queue_timeout

__all__ = ["Admission", "Place"]

_SMOOTHING = 0.2
_LONGEST_RETRY_S = 60


class Admission:
    """Rows of the engine's batch, and the queue before them.

    An answer takes a :class:`Place` when its request arrives, waits in it for a row, and gives both
    back when it ends. All of it happens in the event loop's thread.

    Attributes:
      rows: answers that are made at a time.
      max_waiting: answers that may wait.
      waiting: answers that do.
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
        """Answers that can be taken in where there are none."""
        return self.rows + self.max_waiting

    @property
    def room(self) -> int:
        """Answers that can still be taken in."""
        return self.size - self.waiting - self.active

    @property
    def retry_after_s(self) -> int:
        """Whole seconds until a row should be free for somebody who asks now."""
        seconds = self._row_s * (self.waiting + 1) / self.rows
        return min(max(math.ceil(seconds), 1), _LONGEST_RETRY_S)

    def check_room(self, count: int = 1) -> None:
        """Refuse ``count`` answers that there is no room for.

        Raises:
          ApiError: 429.
        """
        if count > self.room:
            raise queue_full(self.waiting, self.retry_after_s)

    def enter(self, count: int) -> list[Place]:
        """Take ``count`` places, or none.

        Raises:
          ApiError: 429, there is not so much room.
        """
        self.check_room(count)
        return [Place(self) for _ in range(count)]

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


class Place:
    """One answer's place in the queue, counted from its creation until it has a row or is left."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self._waits = True
        admission.waiting += 1

    def leave(self) -> None:
        """Wait no more. May be called again."""
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
