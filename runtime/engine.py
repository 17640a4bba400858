"""An engine serves requests of many threads together, from a thread of its own."""

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
      active: requests whose prompt is being processed or whose tokens are being made.
      waiting: requests that no row is free for.
    """

    active: int
    waiting: int


class Generation:
    """A text that an engine is making. Threads may share it.

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
        """The pieces from the first to the last, waiting for those to come.

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
        """The whole text, once it has ended.

        Raises:
          EoraccError: the request failed.
        """
        return complete(self, self.prompt_tokens)

    @property
    def done(self) -> bool:
        """Whether the text has ended, for whatever reason."""
        with self._changed:
            return self._error is not None or bool(
                self._pieces and self._pieces[-1].finish_reason is not None
            )

    def cancel(self) -> None:
        """Ask for no more: the text ends soon, as ``cancelled`` if it has not ended by then."""
        if self._continuation is not None:
            self._continuation.cancelled = True

    def follow(self, continuation: Continuation) -> None:
        """Be the text that ``continuation`` makes."""
        self.prompt_tokens = len(continuation.prompt)
        self._continuation = continuation

    def take(self, event: Piece | Exception) -> None:
        """Add what is new; called by the engine."""
        with self._changed:
            if isinstance(event, Piece):
                self._pieces.append(event)
            else:
                self._error = event
            self._changed.notify_all()
        if self._listener is not None:
            self._listener(event)


class Engine:
    """Serves requests together: those that come while others are being served join them.

    Memory is bounded: at most ``max_rows`` texts of at most ``max_tokens`` tokens are in the cache.
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
          model: what to serve with; others may use it at the same time.
          max_rows: texts that are made at a time.
          max_waiting: requests that may wait for a row; None for any number.
          max_tokens: of a prompt and its answer together; None for the model's context.
          prefill_chunk: tokens of a prompt that are processed while others wait for a token.
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
        """How busy it is."""
        with self._changed:
            waiting = self._scheduler.waiting + len(self._arrived)
            return EngineLoad(self._scheduler.active, waiting)

    @property
    def alive(self) -> bool:
        """Whether its thread still works: it ends when the engine is closed or has failed."""
        return self._thread.is_alive()

    def submit(self, request: Request, *, listener: Listener | None = None) -> Generation:
        """Have ``request`` served.

        Args:
          request: what to make.
          listener: called in the engine's thread with each piece as it is made; the last one has a
            finish reason, or is an exception. It must not wait. What it raises cancels the request.

        Returns:
          The text, which is being made from now on.

        Raises:
          RequestError: the request cannot be served: no room, no such adapter, bad messages.
          BusyError: too many wait already, or the engine is closed.
        """
        self._check_open()
        generation = Generation(listener)
        one = self.model.prepare(request, generation.take, max_tokens=self._max_tokens)
        generation.follow(one)
        with self._changed:
            try:
                self._check_open()
            except BusyError:
                self.model.bank.release(request.adapter)
                raise
            self._arrived.append(one)
            self._changed.notify_all()
        return generation

    def close(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Take no more requests and end the thread.

        Args:
          drain: serve what has been submitted first; otherwise cancel it.
          timeout: seconds to wait for that; what is not ready by then is cancelled. None for as
            long as it takes.

        Returns:
          Whether nothing had to be cancelled.
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
        """Raises BusyError where a request would be turned away."""
        with self._changed:
            if self._closed:
                raise BusyError("the engine is closed: it takes no more requests")
            if self._max_waiting is None:
                return
            # A request that has just come is nowhere yet, though a row may be free for it.
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
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
            failure = BackendError(f"the engine has failed: {reason(error)}")
        with self._changed:
            self._closed = True
            while self._arrived:
                self._scheduler.add(self._arrived.popleft())
        self._scheduler.close(failure)
