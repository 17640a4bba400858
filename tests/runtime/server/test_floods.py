"""A server that is flooded: it stays in reach, its streams go on, its log stays short."""

from __future__ import annotations

import asyncio
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.runtime.server.child import KEY, ServerProcess

HEADERS = {"Authorization": f"Bearer {KEY}"}
DESCRIPTORS = 80
HALF = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
LONG = {"prompt": "a", "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def scant(adapted_artifact: Path) -> Iterator[ServerProcess]:
    """A server that may open few files."""
    options = ["--rows", "2", "--max-waiting", "16", "--header-timeout", "3"]
    with ServerProcess(adapted_artifact, *options, descriptors=DESCRIPTORS) as server:
        yield server


@contextmanager
def quiet_connections(server: ServerProcess, count: int) -> Iterator[None]:
    url = httpx.URL(server.url)
    with ExitStack() as stack:
        for _ in range(count):
            client = stack.enter_context(
                socket.create_connection((url.host, url.port or 0), timeout=10)
            )
            client.sendall(HALF)
        yield


async def stream(server: ServerProcess) -> tuple[int, bool]:
    """Pieces of a stream, and whether it has its end."""
    pieces, ended = 0, False
    async with (
        httpx.AsyncClient(headers=HEADERS, timeout=60) as client,
        client.stream("POST", f"{server.url}/completions", json=LONG) as response,
    ):
        assert response.status_code == 200
        async for line in response.aiter_lines():
            ended = ended or line == "data: [DONE]"
            pieces += line.startswith("data: {")
    return pieces, ended


def test_quiet_connections_neither_stop_the_server_nor_fill_its_log(scant: ServerProcess) -> None:
    async def test() -> None:
        streaming = asyncio.create_task(stream(scant))
        await asyncio.sleep(0.1)
        with quiet_connections(scant, 100):
            begin = time.monotonic()
            async with httpx.AsyncClient(timeout=5) as client:
                for _ in range(5):
                    response = await client.get(f"{scant.root}/health")
                    assert response.status_code == 200
            assert time.monotonic() - begin < 5
            pieces, ended = await streaming
            assert ended
            assert pieces > 50

    lines = len(scant.lines)
    asyncio.run(test())
    assert any("leaves room for" in line for line in scant.lines)
    others = [line for line in scant.lines[lines:] if '"route"' not in line]
    assert len(others) <= 3, others


def test_a_server_out_of_descriptors_comes_back(scant: ServerProcess) -> None:
    """The limit is lowered under a running server: its own count of connections is of no help."""
    limit = len(list(Path(f"/proc/{scant.pid}/fd").iterdir())) + 3
    lines = len(scant.lines)
    resource.prlimit(scant.pid, resource.RLIMIT_NOFILE, (limit, DESCRIPTORS))
    try:
        with quiet_connections(scant, 30):
            time.sleep(1)
            statuses = {httpx.get(f"{scant.root}/health", timeout=10).status_code for _ in range(3)}
            assert statuses == {200}
    finally:
        resource.prlimit(scant.pid, resource.RLIMIT_NOFILE, (DESCRIPTORS, DESCRIPTORS))
    others = [line for line in scant.lines[lines:] if '"route"' not in line]
    assert sum("Too many open files" in line for line in others) == 1
    assert len(others) <= 4, others


def test_too_few_descriptors_are_one_sentence(adapted_artifact: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"error: the process may open 36 files.*ulimit -n"),
        ServerProcess(adapted_artifact, descriptors=36),
    ):
        pass
