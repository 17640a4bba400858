"""uvicorn's HTTP/1.1 protocol with deadlines for everything that a client may be slow at."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Callable
from enum import StrEnum

import h11
from typing_extensions import override
from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from eoracc.runtime.server.api.errors import header_timeout
from eoracc.runtime.server.connections.limits import ConnectionLimits
from eoracc.runtime.server.connections.refusal import response_bytes

__all__ = ["LEAST_BYTES_PER_S", "Connection", "Waiting"]

LEAST_BYTES_PER_S = 1 << 15
"""Speed at which a client must take what the server holds for it, on top of ``send_timeout_s``."""

_READ_BYTES = 1 << 13
"""Bytes that are read before other connections have their turn. As chunks of one byte, they take
tens of milliseconds."""

_MOST_FRAMING = 1 << 16
"""Bytes around the chunks of a body. Chunks of 16 bytes and more have less than that."""

_BODY_MARGIN_S = 2.0
"""For the application to answer a slow body with 408 before its connection is cut."""


class Waiting(StrEnum):
    """What a connection waits for its client to do. The values are labels of metrics."""

    IDLE = "idle"
    HEADERS = "headers"
    BODY = "body"
    READER = "reader"
    CLOSE = "close"


class Connection(H11Protocol):
    """A connection that is cut when its client keeps the server waiting for too long.

    uvicorn closes a connection that is quiet between two requests. It waits without limit for the
    first request, for the rest of headers and body, and for a client that reads nothing.

    Attributes:
      waiting: what the client has to do; None while the server works.
      since: when it began to wait, by the event loop's clock.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        limits: ConnectionLimits,
        *,
        on_lost: Callable[[Connection], None],
    ) -> None:
        """Prepare for a new socket.

        Args:
          config: of uvicorn.
          server_state: of uvicorn.
          limits: seconds that the client has.
          on_lost: called when the connection is closed.
        """
        super().__init__(config, server_state, app_state={})
        self._limits = limits
        self._on_lost = on_lost
        self._made = False
        self._begun = False
        self._answered = 0
        self._unsent = 0
        self._framing = 0
        self.waiting: Waiting | None = None
        self.since = self.loop.time()

    # --- events of the transport and of uvicorn ---------------------------------------------------

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        super().connection_made(transport)
        self._made = True
        # asyncio's transports read 256 KiB at a time otherwise.
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined] # it is not documented
        self._note()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn does so only after an orderly end
        self._on_lost(self)

    @override
    def data_received(self, data: bytes) -> None:
        amid_body = self._busy and self.conn.their_state is h11.SEND_BODY
        before = len(self.cycle.body) if amid_body else 0
        super().data_received(data)
        self._begun = self._begun or self.scope is not None
        self._note()
        if not amid_body:
            self._framing = 0
        elif not self.cycle.response_complete:
            self._framing += len(data) - (len(self.cycle.body) - before)
            if self._framing > _MOST_FRAMING:
                self.logger.warning("closed a connection: its body came in tiny chunks")
                self.transport.abort()

    @override
    def on_response_complete(self) -> None:
        self._answered += 1
        super().on_response_complete()
        self._note()

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        self._note()

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._note()

    # --- deadlines --------------------------------------------------------------------------------

    @property
    def has_unread_data(self) -> bool:
        """Whether the client has sent something that a busy event loop has not read yet."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(poll.poll(0))

    def check(self, now: float) -> Waiting | None:
        """Cut the connection if its client is too slow.

        Args:
          now: by the event loop's clock.

        Returns:
          What the client was too slow at; None if the connection stays.
        """
        if not self._made:
            return None
        self._note()
        late = self.waiting
        if late is None or now - self.since <= self._allowed_s(late):
            return None
        if late is Waiting.HEADERS and self.conn.our_state is h11.IDLE:
            self.transport.write(response_bytes(header_timeout(self._limits.header_timeout_s)))
            self.transport.close()
            self._note()
        else:
            self.transport.abort()
        return late

    @property
    def _busy(self) -> bool:
        """Whether a request is served."""
        return self._begun and not self.cycle.response_complete

    def _note(self) -> None:
        """Remember since when the client is waited for."""
        waiting, unsent = self._now_waiting(), self.transport.get_write_buffer_size()
        if waiting is not self.waiting:
            self.waiting, self.since, self._unsent = waiting, self.loop.time(), unsent

    def _now_waiting(self) -> Waiting | None:
        if self.transport.is_closing():
            return Waiting.CLOSE
        busy = self._busy
        unread = self.flow.write_paused or (not busy and self.transport.get_write_buffer_size() > 0)
        if unread:
            return Waiting.READER
        if self.conn.their_state is h11.SEND_BODY:
            return Waiting.BODY
        if busy:
            return None
        return Waiting.HEADERS if self.conn.trailing_data[0] else Waiting.IDLE

    def _allowed_s(self, waiting: Waiting) -> float:
        limits = self._limits
        match waiting:
            case Waiting.IDLE if self._answered:
                return limits.keep_alive_s
            case Waiting.IDLE | Waiting.HEADERS:
                return limits.header_timeout_s
            case Waiting.BODY:
                return limits.body_timeout_s + _BODY_MARGIN_S
            case Waiting.READER | Waiting.CLOSE:
                return limits.send_timeout_s + self._unsent / LEAST_BYTES_PER_S
