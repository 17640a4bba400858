from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Receive, Scope, Send

from eoracc.runtime.server.connections.acceptor import Acceptor
from eoracc.runtime.server.connections.limits import ConnectionLimits
from tests.runtime.server.connections.net import GET, HALF, net


async def never(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers only when its client goes."""
    del scope, send
    while (await receive())["type"] != "http.disconnect":
        pass


def error_of(answer: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return found


@pytest.mark.parametrize("first", [b"", HALF], ids=["silent", "half a head"])
def test_a_flood_of_quiet_connections_leaves_room_for_requests(first: bytes) -> None:
    async def test() -> None:
        async with net(ConnectionLimits(max_connections=20)) as server:
            honest = await server.connect()
            assert (await honest.get()).startswith(b"HTTP/1.1 200")
            for _ in range(200):
                await server.connect(first)
            assert (await (await server.connect()).get()).startswith(b"HTTP/1.1 200")
            assert server.acceptor.count == 20
            assert server.closed["evicted"] == 202 - 20
            assert not server.closed["refused"]

    asyncio.run(test())


def test_bodies_that_never_come_leave_room_for_requests() -> None:
    async def test() -> None:
        async with net(ConnectionLimits(max_connections=20), reads_body) as server:
            for _ in range(30):
                await server.connect(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n12")
            assert (await (await server.connect()).get()).startswith(b"HTTP/1.1 200")

    asyncio.run(test())


async def reads_body(scope: Scope, receive: Receive, send: Send) -> None:
    """An application that answers once it has the body."""
    del scope
    while (message := await receive()).get("more_body"):
        pass
    if message["type"] == "http.request":
        length = [(b"content-length", b"4")]
        await send({"type": "http.response.start", "status": 200, "headers": length})
        await send({"type": "http.response.body", "body": b"fine"})


def test_requests_that_are_served_are_not_given_up_for_new_connections() -> None:
    async def test() -> None:
        async with net(ConnectionLimits(max_connections=3), never) as server:
            for _ in range(3):
                await server.connect(GET)
            await asyncio.sleep(0.05)
            answer = await (await server.connect(GET)).answer()
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"\r\nRetry-After: 1\r\n" in answer
            assert b"\r\nConnection: close\r\n" in answer
            assert error_of(answer)["code"] == "too_many_connections"
            assert error_of(answer)["message"].startswith("3 connections are open already")
            assert server.acceptor.count == 3
            assert server.closed == {"refused": 1}
            server.clients[0].writer.close()
            await asyncio.sleep(0.05)
            await server.connect(GET)
            await asyncio.sleep(0.05)
            assert server.acceptor.count == 3
            assert server.closed == {"refused": 1}

    asyncio.run(test())


def test_a_client_that_has_just_connected_is_not_quiet() -> None:
    """Its request is on its way: it would be lost."""

    async def test() -> None:
        async with net(ConnectionLimits(max_connections=4)) as server:
            clients = [await server.connect() for _ in range(12)]
            answers = await asyncio.gather(*(client.get() for client in clients))
            assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)


def test_a_request_that_a_busy_server_has_not_read_is_not_lost() -> None:
    async def test() -> None:
        async with net(ConnectionLimits(max_connections=2)) as server:
            clients = [await server.connect() for _ in range(2)]
            await asyncio.sleep(0.05)
            for client in clients:
                client.writer.write(GET)
            time.sleep(0.3)
            assert not server.acceptor._evict()
            assert all([await client.reader.readuntil(b"fine") for client in clients])

    asyncio.run(test())


def test_one_address_has_a_limit_of_its_own() -> None:
    async def test() -> None:
        async with net(ConnectionLimits(max_per_address=2), never) as server:
            await server.connect(GET)
            quiet = await server.connect()
            await asyncio.sleep(0.3)
            await server.connect(GET)
            assert await quiet.answer() == b""
            assert server.closed == {"evicted": 1}
            answer = await (await server.connect(GET)).answer()
            assert "2 connections from 127.0.0.1" in error_of(answer)["message"]
            assert server.acceptor.count == 2

    asyncio.run(test())


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_many_refusals_hold_few_sockets() -> None:
    async def test() -> None:
        async with net(ConnectionLimits(max_connections=1), never) as server:
            await server.connect(GET)
            await asyncio.sleep(0.05)
            before = open_files()
            others = [await server.connect() for _ in range(40)]
            await server.counted("refused", 40)
            await asyncio.sleep(0.05)
            assert open_files() - before <= 40 + 8
            answers = [await client.answer() for client in others]
            assert all(answer.startswith(b"HTTP/1.1 503 ") for answer in answers)

    asyncio.run(test())


class Exhausted:
    """A listener whose process has no file descriptors left for a while."""

    def __init__(self, listener: socket.socket, failures: int) -> None:
        self._listener = listener
        self.left = failures

    def accept(self) -> tuple[socket.socket, Any]:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._listener.accept()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - of the socket
        return getattr(self._listener, name)


def test_without_descriptors_accepting_pauses_and_quiet_connections_go(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def test() -> None:
        async with net(ConnectionLimits()) as server:
            quiet = await server.connect()
            busy = await server.connect()
            assert await busy.get()
            await asyncio.sleep(0.3)
            acceptor: Any = server.acceptor
            short = acceptor._listener = Exhausted(acceptor._listener, failures=3)
            begin = asyncio.get_running_loop().time()
            late = await server.connect()
            assert (await late.get()).startswith(b"HTTP/1.1 200")
            assert 0.5 < asyncio.get_running_loop().time() - begin < 3
            assert short.left == 0
            assert await quiet.answer() == b""

    with caplog.at_level(logging.ERROR, "eoracc.server"):
        asyncio.run(test())
    assert len(caplog.records) == 3  # one for each pause, not one for each failed call
    assert "Too many open files" in caplog.text
    assert "ulimit -n" in caplog.text


def test_closing_ends_a_pause() -> None:
    async def test() -> None:
        async with net(ConnectionLimits()) as server:
            acceptor: Any = server.acceptor
            acceptor._pause(0.05)
            Acceptor.close(acceptor)
            await asyncio.sleep(0.1)
            await server.connect(GET)  # the kernel takes it
            await asyncio.sleep(0.05)
            assert server.acceptor.count == 0

    asyncio.run(test())
