"""Accept connections: up to a limit, and with a pause while file descriptors are short.

asyncio's own accept loop reports each failed call, thousands in a second, and knows no limit.
uvicorn's ``limit_concurrency`` counts quiet connections like busy ones and refuses every request
above the limit: whoever opens that many connections has closed the server. Here a new connection
takes the place of the one whose client has kept the server waiting the longest.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable

from uvicorn import Config
from uvicorn.server import ServerState

from eoracc.errors import ApiError
from eoracc.runtime.server.api.errors import too_many_connections
from eoracc.runtime.server.connections.connection import Connection, Waiting
from eoracc.runtime.server.connections.limits import ConnectionLimits
from eoracc.runtime.server.connections.refusal import Refusal

__all__ = ["Acceptor"]

_BACKLOG = 2048
"""Connections that the kernel accepts before the server does."""

_AT_ONCE = 16
"""Connections that are accepted before other events have their turn."""

_PAUSE_S = 0.2
"""Pause after a failed call, which would fail again at once."""

_RECHECK_S = 0.05
"""Pause while there is no room, in which connections may end or turn out to be quiet."""

_QUIET_S = {
    Waiting.IDLE: 0.25,
    Waiting.HEADERS: 0.05,  # they come in one piece
    Waiting.BODY: 2.0,
    Waiting.READER: 10.0,
    Waiting.CLOSE: 0.25,
}
"""Seconds after which a connection gives its place to a new one, if it waits for its client."""

_log = logging.getLogger("eoracc.server")


class Acceptor:
    """Accepts the connections of one listening socket.

    Attributes:
      limits: numbers of connections and seconds.
    """

    def __init__(
        self,
        listener: socket.socket,
        config: Config,
        server_state: ServerState,
        limits: ConnectionLimits,
        *,
        on_closed: Callable[[str], None],
    ) -> None:
        """Prepare; :meth:`start` begins to accept.

        Args:
          listener: bound.
          config: of uvicorn.
          server_state: of uvicorn.
          limits: numbers of connections and seconds.
          on_closed: called with the reason when the server cuts or refuses a connection.
        """
        self.limits = limits
        self._listener = listener
        self._config = config
        self._server_state = server_state
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._open: dict[Connection, str] = {}
        self._per_address: Counter[str] = Counter()
        self._starting: set[asyncio.Task[None]] = set()
        self._refused: set[Refusal] = set()
        self._overdue: list[Connection] | None = None
        self._resume: asyncio.TimerHandle | None = None

    @property
    def count(self) -> int:
        """Open connections, without refused ones."""
        return len(self._open)

    def start(self) -> None:
        """Begin to accept connections."""
        self._listener.setblocking(False)
        self._listener.listen(_BACKLOG)
        self._loop.add_reader(self._listener, self._accept)

    def close(self) -> None:
        """Accept no more; open connections stay."""
        if self._resume is not None:
            self._resume.cancel()
        self._loop.remove_reader(self._listener)

    def check(self) -> None:
        """Cut connections whose clients are too slow; to be called a few times a second."""
        now = self._loop.time()
        for connection in list(self._open):
            late = connection.check(now)
            if late is not None:
                self._on_closed(f"{late}_timeout")
                _log.warning("closed a connection: its client was too slow (%s)", late)

    def _accept(self) -> None:
        self._accept_some()
        self._overdue = None  # true for this moment alone

    def _accept_some(self) -> None:
        for _ in range(_AT_ONCE):
            if not self._has_room():
                self._pause(_RECHECK_S)
                return
            try:
                accepted, address = self._listener.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:
                continue  # its client has given it up already
            except OSError as error:
                _log.error(
                    "cannot accept connections (%s): closing quiet ones; raise 'ulimit -n' or "
                    "lower --max-connections",
                    error.strerror,
                )
                for _ in range(_AT_ONCE):
                    self._evict()
                self._pause(_PAUSE_S)
                return
            accepted.setblocking(False)
            self._admit(accepted, str(address[0]))

    def _has_room(self) -> bool:
        """Whether a new connection could be served or refused now; else it waits in the kernel."""
        if self.count < self.limits.max_connections or self._quietest() is not None:
            return True
        if self._starting or any(connection.waiting for connection in self._open):
            return False
        return len(self._refused) < self.limits.refused_at_once

    def _pause(self, seconds: float) -> None:
        """Accept nothing for a moment."""
        self._loop.remove_reader(self._listener)
        self._resume = self._loop.call_later(
            seconds, self._loop.add_reader, self._listener, self._accept
        )

    def _admit(self, accepted: socket.socket, address: str) -> None:
        limit = self.limits.max_per_address
        if limit is not None and self._per_address[address] >= limit and not self._evict(address):
            self._refuse(accepted, too_many_connections(limit, address))
            return
        limit = self.limits.max_connections
        if self.count >= limit and not self._evict():
            self._refuse(accepted, too_many_connections(limit))
            return
        connection = Connection(self._config, self._server_state, self.limits, on_lost=self._forget)
        self._open[connection] = address
        self._per_address[address] += 1
        self._start(connection, accepted, lambda: self._forget(connection))

    def _evict(self, address: str | None = None) -> bool:
        """Cut the quietest connection; returns whether there was one.

        Args:
          address: of its client; None for any.
        """
        quietest = self._quietest(address)
        if quietest is None:
            return False
        self._forget(quietest)
        if self._overdue is not None:
            self._overdue.remove(quietest)
        quietest.transport.abort()
        self._on_closed("evicted")
        _log.warning("closed a quiet connection to make room for a new one")
        return True

    def _quietest(self, address: str | None = None) -> Connection | None:
        """The connection whose client is the longest overdue; None if none is.

        A client that has just connected is not overdue: its request may be on its way.
        """
        if self._overdue is None:
            now = self._loop.time()
            seconds = {
                connection: now - connection.since - _QUIET_S[connection.waiting]
                for connection in self._open
                if connection.waiting is not None
            }
            overdue = [connection for connection, late_s in seconds.items() if late_s >= 0]
            self._overdue = sorted(overdue, key=seconds.__getitem__, reverse=True)
        for connection in self._overdue:
            if address in (None, self._open.get(connection)) and not connection.has_unread_data:
                return connection
        return None

    def _refuse(self, accepted: socket.socket, error: ApiError) -> None:
        self._on_closed("refused")
        _log.warning("refused a connection: %s", error)
        if len(self._refused) >= self.limits.refused_at_once:
            accepted.close()
            return
        refusal = Refusal(error, on_lost=self._refused.discard)
        self._refused.add(refusal)
        self._start(refusal, accepted, lambda: self._refused.discard(refusal))

    def _forget(self, connection: Connection) -> None:
        address = self._open.pop(connection, None)
        if address is None:
            return  # evicted before
        self._per_address[address] -= 1
        if not self._per_address[address]:
            del self._per_address[address]

    def _start(
        self, protocol: asyncio.Protocol, accepted: socket.socket, on_failed: Callable[[], None]
    ) -> None:
        async def connect() -> None:
            try:
                await self._loop.connect_accepted_socket(lambda: protocol, accepted)
            except OSError:
                accepted.close()
                on_failed()

        task = self._loop.create_task(connect())
        self._starting.add(task)
        task.add_done_callback(self._starting.discard)
