"""A request while it is served: the engine's thread generates its answers, the event loop reads.

A request may end early: it times out, its client is gone or too slow, the server stops, or one of
its answers fails. Then all of its answers end, and the engine frees their rows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Protocol, Self

from eoracc.errors import ApiError, BusyError, RequestError
from eoracc.runtime.decode.continuation import Listener
from eoracc.runtime.request import Piece, Request
from eoracc.runtime.server.admission import Admission, QueuePlace
from eoracc.runtime.server.api.errors import request_timeout, slow_client
from eoracc.runtime.server.metrics import Metrics
from eoracc.runtime.server.options import ServerOptions

__all__ = ["ServedRequest", "ServingContext", "SupportsCancel", "SupportsSubmit"]

_log = logging.getLogger("eoracc.server")

_LAST_WORDS_S = 5.0
"""Seconds that a client gets to read the error that ends its stream."""


class SupportsCancel(Protocol):
    """A text that the engine generates, as :class:`eoracc.runtime.Generation` does."""

    def cancel(self) -> None:
        """Stop generating. May be called at any time, from any thread."""


class SupportsSubmit(Protocol):
    """Serves many requests in one batch, as :class:`eoracc.runtime.Engine` does."""

    def submit(self, request: Request, *, listener: Listener) -> SupportsCancel:
        """Start generating; an adapter may have to be loaded first.

        Args:
          request: the prompt and the options.
          listener: is called in the engine's thread with each piece, the last of which has a finish
            reason, or with the exception that ended the text.

        Raises:
          EoraccError: the request cannot be served.
        """


@dataclass(frozen=True)
class ServingContext:
    """Parts of the server that all requests share.

    Attributes:
      engine: generates the answers.
      thread: submits requests, which may take longer than the event loop can wait.
      admission: rows of the engine and the queue before them.
      metrics: of the server.
      options: limits.
      running: requests that are being served.
    """

    engine: SupportsSubmit
    thread: Executor
    admission: Admission
    metrics: Metrics
    options: ServerOptions
    running: set[ServedRequest]


class ServedRequest:
    """The answers to one request; leaving its context ends them.

    ``async with request: async for choice, piece in request: ...``

    Attributes:
      error: the reason why it ended early; else None.
      first_token_s: seconds from the request's arrival to the first token; None before that.
      given_up: set when the client has had its time to read the error.
    """

    def __init__(
        self,
        context: ServingContext,
        requests: Sequence[Request],
        places: Sequence[QueuePlace],
        *,
        model: str,
        prompt_tokens: Sequence[int],
        arrived: float,
    ) -> None:
        """Prepare; generation starts when the context is entered.

        Args:
          context: parts of the server that all requests share.
          requests: to the engine, one for each answer.
          places: in the queue, one for each answer.
          model: label of the metrics.
          prompt_tokens: length of the prompt of each answer.
          arrived: time of the request's arrival, by ``time.monotonic``.
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
            place.leave()  # a task that was cancelled before it started did not
        self._context.running.discard(self)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Index of the answer and piece, in the order of generation.

        Raises:
          ApiError: the request ended early; unread pieces are lost.
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
        """End all answers; the reader gets ``error`` and a few seconds to send it."""
        if self.error is not None:
            return
        self.error = error
        self._events.clear()
        for task in self._tasks:
            task.cancel()
        self._timers.append(self._loop.call_later(_LAST_WORDS_S, self.given_up.set))
        self._wake.set()

    async def _make(self, index: int) -> None:
        """Serve one answer, from its place in the queue to its last piece."""
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
        except Exception as error:  # noqa: BLE001 - any error ends this request only
            self.fail(_as_api_error(error))

    async def _generate(self, index: int) -> str:
        """Let the engine generate an answer; returns its finish reason."""
        end: asyncio.Future[str] = self._loop.create_future()

        def listen(event: Piece | Exception) -> None:
            self._loop.call_soon_threadsafe(self._take, index, event, end)

        context = self._context
        submitted = context.thread.submit(
            context.engine.submit, self._requests[index], listener=listen
        )
        # The engine may end a short answer before ``submit`` has returned in its thread. So only
        # the answer's end is waited for: whoever reads the answer ends this task soon after it.
        submitted.add_done_callback(partial(_tell_refusal, listen))
        try:
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
            self.fail(slow_client(len(self._events)))
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


def _tell_refusal(listen: Listener, submitted: Future[SupportsCancel]) -> None:
    """Tell the listener that the engine has not accepted the generation."""
    if not submitted.cancelled() and isinstance(error := submitted.exception(), Exception):
        listen(error)


def _cancel(submitted: Future[SupportsCancel]) -> None:
    """Cancel the submitted generation, if it was accepted."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, RequestError):
        name = str(error).partition(":")[0]
        return ApiError(str(error), param=name if name.isidentifier() else None)
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
