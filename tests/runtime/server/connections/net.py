"""An acceptor in the test's event loop, and clients that speak bytes."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import uvicorn
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from eoracc.runtime.server.connections.acceptor import Acceptor
from eoracc.runtime.server.connections.limits import ConnectionLimits
from eoracc.runtime.server.process import listen

__all__ = ["GET", "HALF", "Client", "Net", "net"]

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
HALF = b"GET / HTTP/1.1\r\nHost: a\r\n"


@dataclass
class Client:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self, limit_s: float = 5.0) -> bytes:
        """Everything up to the end of the connection; a reset ends it too."""
        parts = []
        async with asyncio.timeout(limit_s):
            with suppress(ConnectionError):
                while part := await self.reader.read(1 << 16):
                    parts.append(part)
        return b"".join(parts)

    async def get(self) -> bytes:
        """Status line and body of ``GET /`` on a connection that stays open."""
        self.writer.write(GET)
        async with asyncio.timeout(5):
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                return await self.reader.readuntil(b"fine")
        return b""


@dataclass
class Net:
    """An acceptor and what it says."""

    acceptor: Acceptor
    address: tuple[str, int]
    closed: Counter[str]
    clients: list[Client] = field(default_factory=list)

    async def connect(self, first: bytes = b"", **options: int) -> Client:
        """A new client that has sent ``first``."""
        sock = socket.socket()
        if size := options.get("receive_buffer"):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, self.address)
        client = Client(*await asyncio.open_connection(sock=sock, limit=1024))
        self.clients.append(client)
        client.writer.write(first)
        return client

    async def counted(self, reason: str, least: int = 1) -> None:
        """Wait until so many connections were closed for ``reason``."""
        async with asyncio.timeout(5):
            while self.closed[reason] < least:
                await asyncio.sleep(0.01)


async def fine(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers at once."""
    del scope, receive
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]}
    )
    await send({"type": "http.response.body", "body": b"fine"})


@asynccontextmanager
async def net(
    limits: ConnectionLimits,
    app: Callable[[Scope, Receive, Send], Awaitable[None]] = fine,
) -> AsyncIterator[Net]:
    """An acceptor for ``app`` that is checked every 10 ms."""
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, ws="none")
    config.timeout_keep_alive = limits.keep_alive_s
    config.load()
    closed: Counter[str] = Counter()
    listener = listen("127.0.0.1", 0)
    state = ServerState()
    acceptor = Acceptor(
        listener, config, state, limits, on_closed=lambda reason: closed.update([reason])
    )
    acceptor.start()

    async def tick() -> None:
        while True:
            acceptor.check()
            await asyncio.sleep(0.01)

    ticking = asyncio.create_task(tick())
    made = Net(acceptor, listener.getsockname(), closed)
    try:
        yield made
    finally:
        ticking.cancel()
        acceptor.close()
        listener.close()
        for client in made.clients:
            client.writer.close()
        for connection in list(state.connections):
            connection.transport.abort()
        while state.connections:
            await asyncio.sleep(0.01)
