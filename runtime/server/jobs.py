"""A request while it is served: the engine's thread makes its answers, the event loop reads them.

Whatever ends a job early (its time is up, its client is gone or too slow, the server stops, one of
its answers fails) ends all of its answers, and the engine frees their rows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from eoracc.errors import ApiError, BusyError, RequestError
from eoracc.runtime.decode.continuation import Listener
from eoracc.runtime.request import Piece, Request
from eoracc.runtime.server.admission import Admission, Place
from eoracc.runtime.server.errors import reads_too_slowly, request_timeout
from eoracc.runtime.server.metrics import Metrics
from eoracc.runtime.server.options import ServerOptions

__all__ = ["Engine", "Generation", "Job", "JobContext"]

_log = logging.getLogger("eoracc.server")

LAST_WORDS_S = 5.0
"""Seconds for an error to reach a client that may not be reading any more."""


class Generation(Protocol):
    """A text that the engine makes."""

    def cancel(self) -> None:
        """Make no more of it. May be called at any time, from any thread."""


class Engine(Protocol):
    """What serves many requests in one batch."""

    def submit(self, request: Request, *, listener: Listener) -> Generation:
        """Begin ``request``; it may have to load an adapter first.

        Args:
          request: what to make.
          listener: is called in the engine's thread with each piece, of which the last has a finish
            reason, or with what went wrong.

        Raises:
          EoraccError: it cannot be served.
        """


@dataclass(frozen=True)
class JobContext:
    """What all jobs share.

    Attributes:
      engine: makes the answers.
      thread: where requests are submitted, for that may take longer than the event loop can wait.
      admission: its rows.
      metrics: are kept up to date.
      options: limits.
      running: jobs that are being served.
    """

    engine: Engine
    thread: Executor
    admission: Admission
    metrics: Metrics
    options: ServerOptions
    running: set[Job]


class Job:
    """The answers to one request, in a context that they do not outlive.

    ``async with job: async for choice, piece in job: ...``

    Attributes:
      error: why it was ended; None while all goes well.
      first_token_s: seconds from the request's arrival; None before that.
      given_up: set when nobody should try to tell the client any more.
    """

    def __init__(
        self,
        context: JobContext,
        requests: Sequence[Request],
        places: Sequence[Place],
        *,
        model: str,
        prompt_tokens: Sequence[int],
        arrived: float,
    ) -> None:
        """Prepare; nothing is begun before the context is entered.

        Args:
          context: what all jobs share.
          requests: one an answer.
          places: in the queue, one an answer.
          model: label of the metrics.
          prompt_tokens: of each answer.
          arrived: when the request came, by ``time.monotonic``.
        """
        self._context = context
        self._requests = requests
        self._places = places
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._arrived = arrived
        self._events: deque[tuple[int, Piece]] = deque()
        self._wake = asyncio.Event()
        self._unfinished = len(requests)
        self._last_token: list[float | None] = [None] * len(requests)
        self._tasks: list[asyncio.Task[None]] = []
        self._timers: list[asyncio.TimerHandle] = []
        self._loop = asyncio.get_running_loop()
        self.error: ApiError | None = None
        self.first_token_s: float | None = None
        self.given_up = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._context.running.add(self)
        limit = self._context.options.request_timeout_s
        left = self._arrived + limit - time.monotonic()
        self._timers.append(
            self._loop.call_later(max(left, 0), lambda: self.fail(request_timeout(limit)))
        )
        self._tasks = [
            asyncio.create_task(self._make(index)) for index in range(len(self._requests))
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for timer in self._timers:
            timer.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for place in self._places:
            place.leave()  # a task that was cancelled before it began did not
        self._context.running.discard(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Pieces of all answers in the order in which they are made.

        Raises:
          ApiError: why the job was ended; pieces that were not read are lost.
        """
        while True:
            while self.error is None and self._events:
                yield self._events.popleft()
            if self.error is not None:
                raise self.error
            if not self._unfinished:
                return
            self._wake.clear()
            await self._wake.wait()

    def fail(self, error: ApiError) -> None:
        """End all answers; whoever reads gets ``error``, and some seconds to pass it on."""
        if self.error is not None:
            return
        self.error = error
        self._events.clear()
        for task in self._tasks:
            task.cancel()
        self._timers.append(self._loop.call_later(LAST_WORDS_S, self.given_up.set))
        self._wake.set()

    async def _make(self, index: int) -> None:
        """One answer, from its place in the queue to its last piece."""
        context = self._context
        try:
            async with self._places[index].row(context.options.queue_timeout_s):
                context.metrics.queue_seconds.observe(time.monotonic() - self._arrived)
                context.metrics.prompt_tokens.labels(self._model).inc(self._prompt_tokens[index])
                reason = "error"
                try:
                    reason = await self._generate(index)
                except asyncio.CancelledError:
                    reason = "cancelled"
                    raise
                finally:
                    context.metrics.answers.labels(self._model, reason).inc()
        except ApiError as error:
            self.fail(error)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises ends this job only
            self.fail(_as_api_error(error))

    async def _generate(self, index: int) -> str:
        """Let the engine make an answer; returns why it ended."""
        end: asyncio.Future[str] = self._loop.create_future()

        def listen(event: Piece | Exception) -> None:
            self._loop.call_soon_threadsafe(self._take, index, event, end)

        context = self._context
        submitted = context.thread.submit(
            context.engine.submit, self._requests[index], listener=listen
        )
        try:
            await asyncio.wrap_future(submitted)
            return await end
        finally:
            if end.cancelled() or not end.done():
                submitted.add_done_callback(_cancel)

    def _take(self, index: int, event: Piece | Exception, end: asyncio.Future[str]) -> None:
        if end.done() or self.error is not None:
            return
        if isinstance(event, Exception):
            end.set_exception(event)
            return
        if event.tokens:
            self._measure(index, len(event.tokens))
        self._events.append((index, event))
        if event.finish_reason is not None:
            self._unfinished -= 1
            end.set_result(event.finish_reason)
        if len(self._events) > self._context.options.stream_buffer:
            self.fail(reads_too_slowly(len(self._events)))
            self.given_up.set()
            return
        self._wake.set()

    def _measure(self, index: int, tokens: int) -> None:
        metrics, now, last = self._context.metrics, time.monotonic(), self._last_token[index]
        self._last_token[index] = now
        metrics.completion_tokens.labels(self._model).inc(tokens)
        metrics.batch_rows.observe(self._context.admission.active)
        if last is not None:
            metrics.token_seconds.observe((now - last) / tokens)
            return
        metrics.first_token_seconds.observe(now - self._arrived)
        if self.first_token_s is None:
            self.first_token_s = now - self._arrived


def _cancel(submitted: Future[Generation]) -> None:
    """Make no more of what was submitted, if anything was."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, RequestError):
        return ApiError(str(error))
    if isinstance(error, BusyError):
        return ApiError(
            str(error),
            status=503,
            kind="server_error",
            code="busy",
            headers={"Retry-After": "1"},
        )
    _log.error("the engine failed", exc_info=error)
    return ApiError(
        "the engine failed on this request: the server's log says why",
        status=500,
        kind="server_error",
        code="engine_error",
    )
