from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Receive, Scope, Send

from eoracc.runtime.server.connections.limits import ConnectionLimits
from tests.runtime.server.connections.net import GET, HALF, Net, fine, net

QUICK = ConnectionLimits(
    header_timeout_s=0.3, body_timeout_s=0.3, keep_alive_s=1, send_timeout_s=0.3
)
POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
App = Callable[[Scope, Receive, Send], Awaitable[None]]


def run(test: Callable[[Net], Awaitable[None]], app: App = fine) -> None:
    async def inner() -> None:
        async with net(QUICK, app) as server:
            await test(server)

    asyncio.run(inner())


def test_headers_that_never_end_are_answered_and_cut() -> None:
    async def test(server: Net) -> None:
        client = await server.connect(HALF)
        answer = await client.answer(limit_s=2)
        assert answer.startswith(b"HTTP/1.1 408 ")
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "timeout"
        assert error["message"].startswith("the request's headers did not arrive within 0.3 s")
        assert server.closed == {"headers_timeout": 1}

    run(test)


def test_a_connection_without_a_byte_is_cut() -> None:
    async def test(server: Net) -> None:
        client = await server.connect()
        assert await client.answer(limit_s=2) == b""
        assert server.closed == {"idle_timeout": 1}

    run(test)


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (b"GET / HTTP/1.1\r\nX: ", "headers_timeout"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 999\r\n\r\n", "body_timeout"),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3e7\r\n",
            "body_timeout",
        ),
    ],
    ids=["headers", "body", "chunk"],
)
def test_a_client_that_sends_byte_by_byte_gains_no_time(first: bytes, reason: str) -> None:
    async def test(server: Net) -> None:
        client = await server.connect(first)

        async def drip() -> None:
            while not client.writer.is_closing():
                client.writer.write(b"a")
                await asyncio.sleep(0.02)

        dripping = asyncio.create_task(drip())
        begin = asyncio.get_running_loop().time()
        await server.counted(reason)
        limit = 0.3 if reason == "headers_timeout" else 2.3
        assert limit <= asyncio.get_running_loop().time() - begin < limit + 1
        dripping.cancel()
        while server.acceptor.count:
            await asyncio.sleep(0.01)

    run(test)


def test_a_body_that_nobody_reads_is_waited_for_no_longer() -> None:
    """uvicorn keeps a connection whose request was answered before its body had come."""

    async def test(server: Net) -> None:
        client = await server.connect(POST + b"Content-Length: 99\r\n\r\n")
        assert await client.reader.readuntil(b"fine")
        for _ in range(40):  # each byte cancels uvicorn's own limit
            client.writer.write(b"a")
            await asyncio.sleep(0.05)
            if server.closed:
                break
        await server.counted("body_timeout")

    run(test)


def test_the_pause_between_two_requests_is_no_time_of_the_headers() -> None:
    async def test(server: Net) -> None:
        client = await server.connect()
        assert await client.get()
        await asyncio.sleep(0.6)  # longer than headers may take
        assert await client.get()
        client.writer.write(b"G")  # cancels uvicorn's limit
        begin = asyncio.get_running_loop().time()
        answer = await client.answer()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert 0.3 < asyncio.get_running_loop().time() - begin < 1.5

    run(test)


def test_a_request_that_is_served_may_take_its_time() -> None:
    async def slow(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(1)
        await fine(scope, receive, send)

    async def test(server: Net) -> None:
        assert (await (await server.connect()).get()).startswith(b"HTTP/1.1 200")
        assert not server.closed

    run(test, slow)


@pytest.mark.parametrize("whole", [True, False], ids=["whole answer", "stream"])
def test_a_client_that_does_not_read_is_cut(*, whole: bool) -> None:
    ended = []

    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        part = b"x" * (1 << 16)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if whole:
            await send({"type": "http.response.body", "body": part * 256})
        else:
            for _ in range(256):
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        ended.append(asyncio.get_running_loop().time())

    async def test(server: Net) -> None:
        # 16 MiB exceed what the kernel takes; so slow a reader has about 0.3 s and 2 s for 64 KiB.
        await server.connect(GET, receive_buffer=4096)
        if whole:
            await asyncio.sleep(0.5)
            (connection,) = server.acceptor._open
            assert connection.waiting == "reader"
            assert connection.transport.get_write_buffer_size() > 1 << 20
            connection._unsent = 0
        await server.counted("reader_timeout")
        while server.acceptor.count:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert ended  # the application is not left behind

    run(test, large)


def test_a_large_answer_is_not_cut_from_a_client_that_reads_it() -> None:
    async def large(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x" * (1 << 23)})

    async def test(server: Net) -> None:
        client = await server.connect(GET.replace(b"Host: a", b"Host: a\r\nConnection: close"))
        read = 0
        while part := await client.reader.read(1 << 16):
            read += len(part)
            await asyncio.sleep(0.005)  # 0.6 s in all
        assert read > 1 << 23
        assert not server.closed

    run(test, large)


def body_in_chunks(size: int, count: int) -> bytes:
    chunk = f"{size:x}\r\n".encode() + b"a" * size + b"\r\n"
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * count + b"0\r\n\r\n"


async def reads_all(scope: Scope, receive: Receive, send: Send) -> None:
    while (await receive()).get("more_body"):
        pass
    await fine(scope, receive, send)


def test_a_body_in_tiny_chunks_holds_nobody_up() -> None:
    async def test(server: Net) -> None:
        client = await server.connect(body_in_chunks(1, 60_000))
        loop = asyncio.get_running_loop()
        longest, last = 0.0, loop.time()
        await asyncio.sleep(0.05)
        while server.acceptor.count:
            await asyncio.sleep(0)
            longest, last = max(longest, loop.time() - last), loop.time()
        assert longest < 1.0  # reading it all at once takes longer
        assert await client.answer() == b""

    run(test, reads_all)


def test_a_body_in_small_chunks_is_read() -> None:
    async def test(server: Net) -> None:
        client = await server.connect(body_in_chunks(16, 8000))
        assert await client.reader.readuntil(b"fine")

    run(test, reads_all)
