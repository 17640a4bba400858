"""The server process: socket, signals, and a shutdown that finishes running requests."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Callable
from time import monotonic
from types import FrameType

import uvicorn
from typing_extensions import override

from eoracc.errors import BackendError
from eoracc.runtime.server.app import create_app
from eoracc.runtime.server.connections.acceptor import Acceptor
from eoracc.runtime.server.connections.limits import ConnectionLimits, fit_to_descriptors
from eoracc.runtime.server.middleware import Observe
from eoracc.runtime.server.service import Service

__all__ = ["listen", "run"]

_STALLED_MS = 60_000
"""Time without acknowledgement after which a connection counts as lost."""

_TICKS_OF_CHECK = 3
"""Tenths of a second between two checks for connections of slow clients."""

_POLL_S = 0.02
_LAST_WORDS_S = 2.0
_CLOSE_S = 5

_log = logging.getLogger("eoracc.server")


def listen(host: str, port: int) -> socket.socket:
    """Bind a socket; port 0 chooses any free port.

    Raises:
      BackendError: the address is in use or does not belong to this machine.
    """
    bound: socket.socket | None = None
    try:
        info = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(info[0], socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit these options. Without them, connections of clients that vanish or
        # stop reading would be kept forever.
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
        bound.bind(info[4])
    except (OSError, UnicodeError) as error:
        if bound is not None:
            bound.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise BackendError(
            f"{host}:{port}: cannot listen there ({reason}): choose another --host or --port"
        ) from None
    return bound


def run(
    service: Service,
    listener: socket.socket,
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a signal, then let running requests finish within the grace period.

    Args:
      service: behind the routes.
      listener: socket from :func:`listen`; closed at the end.
      on_ready: called once connections are accepted.
    """
    app = create_app(service)
    config = uvicorn.Config(
        app,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        timeout_keep_alive=service.options.connections.keep_alive_s,
        timeout_graceful_shutdown=_CLOSE_S,
    )
    limits = fit_to_descriptors(service.options.connections)
    if limits != service.options.connections:
        _log.warning(
            "'ulimit -n' leaves room for %d connections only, not %d",
            limits.max_connections,
            service.options.connections.max_connections,
        )
    # What is loaded stays: looking through it would stop the streams for tens of milliseconds.
    gc.freeze()
    server = _Server(config, service, app, listener, limits, on_ready)
    try:
        server.run([listener])
    finally:
        service.close()


class _Server(uvicorn.Server):
    """uvicorn with limits of connections and a graceful shutdown.

    The socket stays open until running requests finish.
    Meanwhile ``/health`` returns 503 to load balancers, and new requests get 503 instead of a
    refused connection.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        service: Service,
        app: Observe,
        listener: socket.socket,
        limits: ConnectionLimits,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._service = service
        self._app = app
        self._listener = listener
        self._limits = limits
        self._acceptor: Acceptor | None = None
        self._on_ready = on_ready
        self._loop: asyncio.AbstractEventLoop | None = None
        self._drain: asyncio.Task[None] | None = None

    @override
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup([])
        metrics = self._service.metrics
        acceptor = self._acceptor = Acceptor(
            self._listener,
            self.config,
            self.server_state,
            self._limits,
            on_closed=lambda reason: metrics.connections_closed.labels(reason).inc(),
        )
        metrics.gauge("eoracc_connections", "Open connections", lambda: acceptor.count)
        acceptor.start()
        self._on_ready()

    @override
    async def on_tick(self, counter: int) -> bool:
        if self._acceptor is not None and counter % _TICKS_OF_CHECK == 0:
            self._acceptor.check()
        return await super().on_tick(counter)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        await super().shutdown(sockets)

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish running requests on the first signal, end at once on the second."""
        if self._service.draining or self._loop is None:
            self.should_exit = True
            if self._loop is not None:
                self._loop.call_soon_threadsafe(self._service.abort)
            return
        self._service.draining = True
        self._loop.call_soon_threadsafe(self._begin_drain)

    def _begin_drain(self) -> None:
        self._drain = asyncio.ensure_future(self._finish())

    async def _finish(self) -> None:
        grace = self._service.options.grace_s
        _log.info("finishing %d requests within %g s", self._app.in_flight, grace)
        if not await self._idle(grace):
            _log.warning("cancelling %d requests that did not finish", self._app.in_flight)
            self._service.abort()
            await self._idle(_LAST_WORDS_S)
        self.should_exit = True

    async def _idle(self, timeout_s: float) -> bool:
        """Wait up to ``timeout_s`` for running requests; returns whether all have finished."""
        end = monotonic() + timeout_s
        while self._app.in_flight and monotonic() < end:
            await asyncio.sleep(_POLL_S)
        return not self._app.in_flight
