"""Clients that vanish, read slowly or come too many; an engine that is held by the hand."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from starlette.types import Message

from tests.runtime.server.fake import FakeEngine, Server, completion, piece, serve, settle

PATH = "/v1/completions"


class Wire:
    """A connection: what a server sends on it, and a client that can go away or stop reading."""

    def __init__(self, body: bytes) -> None:
        self._body = [body]
        self.gone = asyncio.Event()
        self.reads = asyncio.Event()
        self.reads.set()
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.reads.wait()
        self.sent.append(message)

    @property
    def status(self) -> int | None:
        return next((int(m["status"]) for m in self.sent if "status" in m), None)

    @property
    def body(self) -> bytes:
        return b"".join(m.get("body", b"") for m in self.sent)

    @property
    def complete(self) -> bool:
        return any("body" in m and not m.get("more_body") for m in self.sent)

    @property
    def events(self) -> list[Any]:
        parts = self.body.decode().split("\n\n")[:-1]
        return [
            part if part == "data: [DONE]" else json.loads(part.removeprefix("data: "))
            for part in parts
        ]


@asynccontextmanager
async def asking(
    server: Server, **fields: object
) -> AsyncIterator[tuple[Wire, asyncio.Task[None]]]:
    """A request that is being served; it must have ended by the end of the context."""
    wire = Wire(completion(**fields))
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
        "root_path": "",
        "scheme": "http",
        "headers": [(b"content-type", b"application/json")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    task = asyncio.create_task(server.app(scope, wire.receive, wire.send))
    try:
        await settle()
        yield wire, task
        await asyncio.wait_for(task, 5)
    finally:
        task.cancel()


def run(test: Callable[[Server], Awaitable[None]], **options: Any) -> None:  # noqa: ANN401
    async def inner() -> None:
        async with serve(FakeEngine(), **options) as server:
            await test(server)
            admission = server.service.admission
            assert (admission.active, admission.waiting) == (0, 0)
            assert server.app.in_flight == 0

    asyncio.run(inner())


def test_stream_events_come_one_by_one() -> None:
    async def test(server: Server) -> None:
        async with asking(server, stream=True, stream_options={"include_usage": True}) as (wire, _):
            assert wire.sent == []
            generation = server.engine.generations[0]
            generation.say(piece("ab"))
            await settle()
            assert wire.status == 200
            assert [event["choices"][0]["text"] for event in wire.events] == ["ab"]
            assert not wire.complete
            generation.say(piece("c", "length"))
        *parts, usage, done = wire.events
        assert [part["choices"][0]["text"] for part in parts] == ["ab", "c"]
        assert [part["choices"][0]["finish_reason"] for part in parts] == [None, "length"]
        assert [part["usage"] for part in parts] == [None, None]
        assert usage["choices"] == []
        assert usage["usage"] == {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        assert done == "data: [DONE]"
        assert len({part["id"] for part in (*parts, usage)}) == 1
        assert wire.complete

    run(test)


def test_answers_of_one_stream_are_interleaved_as_they_are_made() -> None:
    async def test(server: Server) -> None:
        async with asking(server, stream=True, n=2) as (wire, _):
            first, second = server.engine.generations
            first.say(piece("a"))
            second.say(piece("b"))
            second.say(piece("B", "stop"))
            first.say(piece("A", "stop"))
        choices = [event["choices"][0] for event in wire.events[:-1]]
        assert [(c["index"], c["text"]) for c in choices] == [
            (0, "a"),
            (1, "b"),
            (1, "B"),
            (0, "A"),
        ]

    run(test)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_vanishes_frees_its_rows(stream: bool, begun: bool) -> None:
    async def test(server: Server) -> None:
        async with asking(server, stream=stream, n=2) as (wire, task):
            if begun:
                server.engine.generations[0].say(piece("a"))
                await settle()
            assert server.service.admission.active == 2
            wire.gone.set()
            await asyncio.wait_for(task, 5)
            await settle()
            assert [one.cancelled for one in server.engine.generations] == [True, True]
            assert server.service.admission.active == 0
        status = 200 if stream and begun else 499
        line = f'eoracc_requests_total{{route="{PATH}",status="{status}"}}'
        assert await server.metric(line) == 1
        cancelled = 'eoracc_answers_total{model="backbone",reason="cancelled"}'
        assert await server.metric(cancelled) == 2
        server.engine.generations[0].say(piece("late", "stop"))  # and nothing breaks
        await settle()

    run(test)


def test_a_client_that_vanishes_in_the_queue_leaves_it() -> None:
    async def test(server: Server) -> None:
        async with asking(server) as (_, _), asking(server) as (second, waiting):
            assert server.service.admission.waiting == 1
            assert len(server.engine.generations) == 1
            second.gone.set()
            await asyncio.wait_for(waiting, 5)
            assert server.service.admission.waiting == 0
            server.engine.generations[0].say(piece("a", "stop"))
            await settle()
            assert len(server.engine.generations) == 1

    run(test, rows=1)


def test_a_slow_reader_is_cut_off_and_harms_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eoracc.runtime.server.served_request._LAST_WORDS_S", 60)

    async def test(server: Server) -> None:
        async with (
            asking(server, stream=True) as (slow, slow_task),
            asking(server, stream=True) as (other, _),
        ):
            first, second = server.engine.generations
            slow.reads.clear()
            for _ in range(12):
                first.say(piece("x"))
                second.say(piece("y"))
                await settle()
            assert first.cancelled
            assert not second.cancelled
            await asyncio.wait_for(slow_task, 5)
            assert not slow.complete
            second.say(piece("", "stop"))
        texts = [event["choices"][0]["text"] for event in other.events[:-1]]
        assert "".join(texts) == "y" * 12
        assert other.complete

    run(test, stream_buffer=8)


def test_nobody_waits_for_ever_to_tell_a_client_of_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eoracc.runtime.server.served_request._LAST_WORDS_S", 0.1)

    async def test(server: Server) -> None:
        async with asking(server, stream=True) as (wire, _):
            wire.reads.clear()
            server.engine.generations[0].say(piece("x"))
        assert not wire.complete

    run(test, request_timeout_s=0.2)


def test_a_burst_that_fits_is_no_reason_to_cut_off() -> None:
    async def test(server: Server) -> None:
        async with asking(server, stream=True) as (wire, _):
            wire.reads.clear()
            server.engine.generations[0].say(*[piece("x")] * 7, piece("x", "stop"))
            await settle()
            wire.reads.set()
        assert wire.body.count(b'"text":"x"') == 8
        assert wire.complete

    run(test, stream_buffer=8)


@pytest.mark.parametrize("stream", [False, True])
def test_full_queue(stream: bool) -> None:
    async def test(server: Server) -> None:
        async with asking(server) as (_, _), asking(server) as (_, _):
            async with asking(server, stream=stream) as (third, _):
                pass
            assert third.status == 429
            error = json.loads(third.body)["error"]
            assert error["code"] == "queue_full"
            assert error["message"].startswith("1 answers are waiting already")
            assert (b"retry-after", b"2") in third.sent[0]["headers"]
            server.engine.generations[0].say(piece("a", "stop"))
            await settle()
            server.engine.generations[1].say(piece("b", "stop"))

    run(test, rows=1, max_waiting=1)


def test_answers_that_do_not_all_fit_are_all_refused() -> None:
    async def test(server: Server) -> None:
        async with asking(server) as (_, _):
            async with asking(server, n=2) as (wire, _):
                pass
            assert wire.status == 429
            assert len(server.engine.generations) == 1
            async with asking(server) as (_, _):
                for place in range(2):
                    server.engine.generations[place].say(piece("a", "stop"))
                    await settle()

    run(test, rows=1, max_waiting=1)


def test_more_answers_than_can_ever_fit() -> None:
    async def test(server: Server) -> None:
        async with asking(server, n=3) as (wire, _):
            pass
        assert wire.status == 400
        assert "n: 3 answers exceed the limit of 2: ask for fewer" in wire.body.decode()

    run(test, rows=2, max_waiting=0)


def test_first_come_first_served() -> None:
    async def test(server: Server) -> None:
        async with (
            asking(server, prompt="1"),
            asking(server, prompt="2"),
            asking(server, prompt="3"),
        ):
            for place in range(3):
                generation = server.engine.generations[place]
                assert bytes(generation.request.prompt) == b"%d" % (place + 1)  # type: ignore[arg-type]
                assert len(server.engine.generations) == place + 1
                generation.say(piece("a", "stop"))
                await settle()

    run(test, rows=1)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_in_the_queue(stream: bool) -> None:
    async def test(server: Server) -> None:
        async with asking(server) as (_, _):
            async with asking(server, stream=stream) as (second, _):
                pass
            assert second.status == 503
            assert json.loads(second.body)["error"]["code"] == "queue_timeout"
            server.engine.generations[0].say(piece("a", "stop"))
        assert len(server.engine.generations) == 1

    run(test, rows=1, queue_timeout_s=0.05)


@pytest.mark.parametrize("stream", [False, True])
def test_too_long_in_all(stream: bool) -> None:
    async def test(server: Server) -> None:
        async with asking(server, stream=stream) as (wire, _):
            server.engine.generations[0].say(piece("a"))
        assert server.engine.generations[0].cancelled
        if stream:
            assert wire.status == 200
            first, error = wire.events
            assert first["choices"][0]["text"] == "a"
            assert error["error"]["code"] == "timeout"
        else:
            assert wire.status == 504
            assert json.loads(wire.body)["error"]["code"] == "timeout"
        assert wire.complete

    run(test, request_timeout_s=0.2)


def test_one_answer_that_fails_ends_the_others_of_its_request() -> None:
    async def test(server: Server) -> None:
        async with asking(server, stream=True, n=2) as (wire, _):
            first, second = server.engine.generations
            first.say(piece("a"))
            await settle()
            second.listener(RuntimeError("broken"))
        assert first.cancelled
        assert wire.events[-1]["error"]["code"] == "engine_error"

    run(test)


def test_abort_tells_clients_why() -> None:
    async def test(server: Server) -> None:
        async with asking(server) as (whole, _), asking(server, stream=True) as (stream, _):
            server.engine.generations[1].say(piece("a"))
            await settle()
            server.service.abort()
        assert whole.status == 503
        assert stream.events[-1]["error"]["code"] == "shutting_down"
        assert all(one.cancelled for one in server.engine.generations)

    run(test)


def test_a_body_that_drips_in_is_not_waited_for() -> None:
    async def test(server: Server) -> None:
        wire = Wire(b"")

        async def drip() -> Message:
            await asyncio.sleep(0.01)
            return {"type": "http.request", "body": b" ", "more_body": True}

        wire.receive = drip  # type: ignore[method-assign]
        scope = {
            "type": "http",
            "method": "POST",
            "path": PATH,
            "headers": [(b"content-type", b"application/json")],
        }
        await asyncio.wait_for(server.app(scope, wire.receive, wire.send), 5)
        assert wire.status == 408

    run(test, request_timeout_s=0.1)
