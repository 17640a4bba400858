"""Send the answers to a request, whole or as a stream, until the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable

from starlette.responses import Response
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from eoracc.errors import ApiError
from eoracc.runtime.server.api.responses import Choice, Form, sse_event
from eoracc.runtime.server.record import RequestRecord
from eoracc.runtime.server.served_request import ServedRequest

__all__ = ["TextReply"]

_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would hold events back
)


class TextReply(Response):
    """The response to a request for text.

    The request is served exactly as long as the response lives: until its last byte is sent, or its
    client has gone or has stopped reading.
    """

    def __init__(
        self, request: ServedRequest, form: Form, choices: list[Choice], *, stream: bool
    ) -> None:
        super().__init__()
        self._request = request
        self._form = form
        self._choices = choices
        self._stream = stream

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        record = RequestRecord.of(scope)
        async with self._request:
            write = self._write_stream(record, send) if self._stream else self._write_whole(send)
            writing = asyncio.create_task(write)
            others = (
                asyncio.create_task(_disconnected(receive)),
                asyncio.create_task(self._request.given_up.wait()),
            )
            try:
                await asyncio.wait((writing, *others), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (writing, *others):
                    if not task.done():
                        task.cancel()
                results = await asyncio.gather(writing, *others, return_exceptions=True)
                record.completion_tokens = sum(choice.tokens for choice in self._choices)
                record.first_token_s = self._request.first_token_s
            if isinstance(results[0], asyncio.CancelledError):
                error = self._request.error
                record.code = "client_gone" if error is None else error.code
            elif isinstance(results[0], BaseException):
                raise results[0]

    async def _write_whole(self, send: Send) -> None:
        async for index, piece in self._request:
            self._choices[index].add(piece)
        body = json.dumps(self._form.whole(self._choices), ensure_ascii=False).encode()
        length = (b"content-length", str(len(body)).encode())
        await _start(send, [_JSON, length])
        await send({"type": "http.response.body", "body": body})

    async def _write_stream(self, record: RequestRecord, send: Send) -> None:
        # Nothing is sent before there is something to say: until then an error has a status.
        begun: set[int] = set()
        started = False
        try:
            async for index, piece in self._request:
                if not started:
                    await _start(send, _EVENTS)
                    started = True
                choice = self._choices[index]
                choice.add(piece)
                if index not in begun:
                    begun.add(index)
                    await _send_events(send, self._form.begin(index))
                await _send_events(send, self._form.piece(index, choice, piece))
            await _send_events(send, self._form.end(self._choices))
        except ApiError as error:
            if not started:
                raise
            record.code = error.code
            await _send_events(send, [sse_event(error.body())])
        await send({"type": "http.response.body", "body": b""})


async def _start(send: Send, headers: Iterable[tuple[bytes, bytes]]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": list(headers)})


async def _send_events(send: Send, events: Iterable[bytes]) -> None:
    body = b"".join(events)
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
