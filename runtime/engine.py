"""The serving engine: requests of many threads, served together in a thread of its own."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from eoracc.errors import BackendError, BusyError, reason
from eoracc.runtime.decode.continuation import Continuation, Listener, complete
from eoracc.runtime.decode.scheduler import PREFILL_CHUNK
from eoracc.runtime.request import Completion, Piece, Request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from eoracc.runtime.model import Model

__all__ = ["Engine", "EngineLoad", "Generation"]


@dataclass(frozen=True)
class EngineLoad:
    """How busy an engine is.

    Attributes:
      active: requests that have a row: in prefill or decoding.
      waiting: requests that wait for a row.
    """

    active: int
    waiting: int


class Generation:
    """A text that an engine generates. Threads may share it.

    Attributes:
      prompt_tokens: length of the prompt.
    """

    def __init__(self, listener: Listener | None) -> None:
        self.prompt_tokens = 0
        self._listener = listener
        self._changed = threading.Condition()
        self._pieces: list[Piece] = []
        self._error: Exception | None = None
        self._continuation: Continuation | None = None

    def __iter__(self) -> Iterator[Piece]:
        """All pieces from the first to the last; blocks until the next one is there.

        Raises:
          EoraccError: the request failed.
        """
        place = 0
        while True:
            with self._changed:
                while len(self._pieces) == place:
                    if self._error is not None:
                        raise self._error
                    self._changed.wait()
                piece = self._pieces[place]
            yield piece
            if piece.finish_reason is not None:
                return
            place += 1

    def result(self) -> Completion:
        """The whole text; blocks until it has ended.

        Raises:
          EoraccError: the request failed.
        """
        return complete(self, self.prompt_tokens)

    @property
    def done(self) -> bool:
        """Whether the text has ended, normally or not."""
        with self._changed:
            return self._error is not None or bool(
                self._pieces and self._pieces[-1].finish_reason is not None
            )

    def cancel(self) -> None:
        """Stop generating: the text ends soon, as ``cancelled`` if it has not ended before."""
        if self._continuation is not None:
            self._continuation.cancelled = True

    def follow(self, continuation: Continuation) -> None:
        """Set the continuation that generates the text."""
        self.prompt_tokens = len(continuation.prompt)
        self._continuation = continuation

    def take(self, event: Piece | Exception) -> None:
        """Add a piece or an error; called by the engine."""
        with self._changed:
            if isinstance(event, Piece):
                self._pieces.append(event)
            else:
                self._error = event
            self._changed.notify_all()
        if self._listener is not None:
            self._listener(event)


class Engine:
    """Serves requests in one batch, which new requests join at any time.

    Memory is bounded: the cache holds at most ``max_rows`` texts of at most ``max_tokens`` tokens.
    """

    def __init__(
        self,
        model: Model,
        *,
        max_rows: int = 8,
        max_waiting: int | None = None,
        max_tokens: int | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
    ) -> None:
        """Start the thread; :meth:`close` ends it.

        Args:
          model: to serve; it may be used otherwise at the same time.
          max_rows: texts that are generated at a time.
          max_waiting: requests that may wait for a row; None for any number.
          max_tokens: most tokens of a prompt and its answer together; None for the model's context.
          prefill_chunk: prompt tokens of one step; the other texts wait for their next token
            meanwhile.
        """
        self.model = model
        self._max_waiting = max_waiting
        self._max_tokens = min(max_tokens or model.context_length, model.context_length)
        self._scheduler = model.scheduler(max_rows=max_rows, chunk=prefill_chunk)
        self._changed = threading.Condition()
        self._arrived: deque[Continuation] = deque()
        self._max_rows = max_rows
        self._closed = self._cancel = False
        self._thread = threading.Thread(target=self._work, name="eoracc-engine", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(drain=kind is None)

    @property
    def load(self) -> EngineLoad:
        """Numbers of active and waiting requests."""
        with self._changed:
            waiting = self._scheduler.waiting + len(self._arrived)
            return EngineLoad(self._scheduler.active, waiting)

    @property
    def alive(self) -> bool:
        """Whether the thread runs: it ends when the engine is closed or has failed."""
        return self._thread.is_alive()

    def submit(self, request: Request, *, listener: Listener | None = None) -> Generation:
        """Start to serve ``request``.

        Args:
          request: prompt and options.
          listener: called in the engine's thread with each piece; the last one has a finish reason,
            or is an exception. It must not block. An exception that it raises cancels the request.

        Returns:
          The text, generated from now on.

        Raises:
          RequestError: the prompt is too long, the adapter unknown, or the messages are invalid.
          BusyError: too many requests are waiting, or the engine is closed.
        """
        self._check_open()
        generation = Generation(listener)
        continuation = self.model.prepare(request, generation.take, max_tokens=self._max_tokens)
        generation.follow(continuation)
        with self._changed:
            try:
                self._check_open()
            except BusyError:
                self.model.bank.release(request.adapter)
                raise
            self._arrived.append(continuation)
            self._changed.notify_all()
        return generation

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Accept no more requests and end the thread.

        Args:
          drain: first serve the submitted requests; otherwise cancel them.
          timeout: seconds to wait for them before they are cancelled; None for no limit.

        Returns:
          Whether no request had to be cancelled.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if drain:
            self._thread.join(timeout)
        served = not self._thread.is_alive()
        with self._changed:
            self._cancel = True
            self._changed.notify_all()
        self._thread.join()
        return served

    def _check_open(self) -> None:
        """Raise BusyError if a request would be rejected."""
        with self._changed:
            if self._closed:
                raise BusyError("the engine is closed: it takes no more requests")
            if self._max_waiting is None:
                return
            # A request that has just arrived has no row yet, although one may be free.
            waiting = self._scheduler.waiting + len(self._arrived)
            waiting -= max(0, self._max_rows - self._scheduler.active)
            if waiting >= self._max_waiting:
                raise BusyError(f"{waiting} requests are waiting already: try again later")

    def _work(self) -> None:
        failure: Exception | None = None
        busy = False
        try:
            while True:
                with self._changed:
                    while not (busy or self._arrived or self._closed):
                        self._changed.wait()
                    if self._cancel or (self._closed and not busy and not self._arrived):
                        break
                    while self._arrived:
                        self._scheduler.add(self._arrived.popleft())
                busy = self._scheduler.step()
        except Exception as error:  # noqa: BLE001 - every waiting request gets it
            failure = BackendError(f"the engine has failed: {reason(error)}")
        with self._changed:
            self._closed = True
            while self._arrived:
                self._scheduler.add(self._arrived.popleft())
        self._scheduler.close(failure)
