"""Hundreds of requests at once, through sockets: each is answered."""

from __future__ import annotations

import asyncio
import json
from collections import Counter

import pytest

from eoracc.runtime.server.connections.limits import ConnectionLimits
from tests.runtime.server.connections.net import net
from tests.runtime.server.fake import COMPLETIONS, JSON, completion, serve

REQUESTS = 500


@pytest.mark.parametrize("connections", [600, 40])
def test_each_of_500_requests_is_answered(connections: int) -> None:
    body = completion()
    lines = [f"POST {COMPLETIONS} HTTP/1.1", "Host: localhost", "Connection: close"]
    lines += [f"{name}: {value}" for name, value in JSON.items()]
    request = "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body

    async def test() -> None:
        limits = ConnectionLimits(max_connections=connections)
        async with serve(rows=2, max_waiting=30) as server, net(limits, server.app) as wire:

            async def ask() -> bytes:
                return await (await wire.connect(request)).answer(limit_s=30)

            answers = await asyncio.gather(*(ask() for _ in range(REQUESTS)))
        statuses = Counter(answer.split()[1] for answer in answers)
        assert set(statuses) <= {b"200", b"429", b"503"}, statuses
        assert statuses[b"200"] >= 32
        for answer in answers:
            head, _, content = answer.partition(b"\r\n\r\n")
            if b" 200 " in head.splitlines()[0]:
                assert json.loads(content)["choices"][0]["text"] == "HELLO"
            else:
                codes = {"queue_full", "too_many_connections"}
                assert json.loads(content)["error"]["code"] in codes
                assert b"\r\nretry-after: " in head.lower()

    asyncio.run(test())
