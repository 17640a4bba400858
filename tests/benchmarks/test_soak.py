from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from benchmarks.soak import (
    Memory,
    Soak,
    build_again,
    delete,
    figures_of,
    memory_of,
    overwrite,
    table_of,
)
from benchmarks.soak_clients import KINDS, Clients, Outcome


def test_figures_of_one_kind() -> None:
    outcomes = [
        *(Outcome("whole", latency_ms=float(time), tokens=2) for time in range(101)),
        Outcome("whole", latency_ms=None, busy=True),
        Outcome("whole", latency_ms=None, failure="lost answer (ReadError)"),
    ]
    found = figures_of("whole", outcomes)
    assert (found.requests, found.busy) == (103, 1)
    assert found.failures == {"lost answer (ReadError)": 1}
    assert (found.p50_ms, found.p99_ms) == (50, 99)
    assert figures_of("odd", []).p99_ms is None


def test_memory_leaves_the_first_tenth_out() -> None:
    samples = [(float(second), 1000 if second < 10 else 2000 + 3 * second) for second in range(101)]
    found = memory_of(samples, peak=9000)
    assert (found.start, found.end, found.peak) == (2030, 2300, 9000)
    assert found.slope == pytest.approx(3 * 3600)


def test_table_has_every_figure() -> None:
    kinds = [figures_of("whole", [Outcome("whole", latency_ms=12.0, failure="wrong answer")])]
    soak = Soak(60.0, kinds, 1, 0, 1, 1, 33.3, Memory(2**20, 2**21, 2**22, 0.0), {"x": 3}, 0, 0)
    text = table_of(soak)
    assert "1 requests in 60 s, 33.3 tokens/s" in text
    assert "1 failures: 0 lost, 1 wrong" in text
    assert "memory 1.0 MiB, at the end 2.0, at most 4.0" in text
    assert "whole: 1 x wrong answer" in text


def outcomes_of(answer: Callable[[httpx.Request], httpx.Response]) -> dict[str, Outcome]:
    """Outcomes of all kinds at a server that answers like ``answer`` once it has been learnt."""
    learnt = False

    def handle(request: httpx.Request) -> httpx.Response:
        return answer(request) if learnt else whole_answer(request)

    async def send() -> dict[str, Outcome]:
        nonlocal learnt
        transport = httpx.MockTransport(handle)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            clients = Clients(client, ["math"], seed=0)
            await clients.learn()
            learnt = True
            return {kind: await clients.send(kind) for kind in KINDS}

    return asyncio.run(send())


def whole_answer(_: httpx.Request, text: str = "x") -> httpx.Response:
    content = {"choices": [{"text": text}] * 4, "usage": {"completion_tokens": 3}}
    return httpx.Response(200, json=content)


def failures_of(answer: Callable[[httpx.Request], httpx.Response]) -> dict[str, str | None]:
    return {kind: outcome.failure for kind, outcome in outcomes_of(answer).items()}


def test_what_fails() -> None:
    fine = failures_of(whole_answer)
    assert fine["whole"] is fine["several"] is fine["summed"] is fine["chat"] is None
    assert fine["streamed"] == "lost answer (no end)"
    assert fine["odd"] == "status 200"
    assert failures_of(lambda request: whole_answer(request, "y"))["whole"] == "wrong answer"
    assert set(failures_of(lambda _: httpx.Response(500)).values()) == {"status 500", None}

    def lose(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone", request=request)

    assert set(failures_of(lose).values()) == {"lost answer (ReadError)"}


def test_what_does_not_fail() -> None:
    busy = outcomes_of(lambda _: httpx.Response(429))
    assert all(busy[kind].busy and busy[kind].latency_ms is None for kind in ("whole", "streamed"))
    assert busy["whole"].failure is None

    events = [{"choices": [{"text": "x"}]}, {"choices": [], "usage": {"completion_tokens": 5}}]
    lines = [f"data: {json.dumps(event)}" for event in events] + ["data: [DONE]", ""]
    streamed = outcomes_of(lambda _: httpx.Response(200, text="\n\n".join(lines)))["streamed"]
    assert (streamed.failure, streamed.tokens) == (None, 5)
    refused = httpx.Response(400, json={"error": {"message": "no"}})
    assert failures_of(lambda _: refused)["odd"] is None


def test_changes_of_the_folder(tmp_path: Path) -> None:
    original, folder = tmp_path / "original", tmp_path / "artifact"
    original.mkdir()
    (original / "model.data").write_bytes(b"weights")
    for _ in range(2):  # from no folder, and from an older one
        build_again(folder, original)
        assert (folder / "model.data").read_bytes() == b"weights"
    with (folder / "model.data").open("rb") as file:
        overwrite(folder, original)
        assert file.read() == bytes(7)
    delete(folder, original)
    delete(folder, original)
    assert sorted(tmp_path.iterdir()) == [original]
