"""Answer a connection that finds no room, without a request being read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import h11
from typing_extensions import override

from eoracc.errors import ApiError

__all__ = ["Refusal", "response_bytes"]

_LINGER_S = 1.0


def response_bytes(error: ApiError) -> bytes:
    """``error`` as the only response of a connection."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = {
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
        **error.headers,
        "Connection": "close",
    }
    connection = h11.Connection(h11.SERVER)
    events = (
        h11.Response(status_code=error.status, headers=list(headers.items())),
        h11.Data(data=body),
        h11.EndOfMessage(),
    )
    return b"".join(connection.send(event) or b"" for event in events)


class Refusal(asyncio.Protocol):
    """Sends an error and closes the connection.

    What the client sends meanwhile is read and dropped: closing a socket with unread bytes resets
    the connection, and the reset overtakes the answer.
    """

    def __init__(self, error: ApiError, *, on_lost: Callable[[Refusal], None]) -> None:
        """Prepare to send ``error``; ``on_lost`` is called when the connection is closed."""
        self._error = error
        self._on_lost = on_lost
        self._timer: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as in uvicorn
        transport.write(response_bytes(self._error))
        if transport.can_write_eof():
            transport.write_eof()
        self._timer = asyncio.get_running_loop().call_later(_LINGER_S, transport.abort)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._on_lost(self)
