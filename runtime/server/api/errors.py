"""Errors of the API, in the form of OpenAI's API.

The body is ``{"error": {"message", "type", "param", "code"}}``; the message is one sentence.
"""

from __future__ import annotations

from eoracc.errors import ApiError

__all__ = [
    "bad_request",
    "queue_full",
    "queue_timeout",
    "request_timeout",
    "shutting_down",
    "slow_client",
]


def bad_request(message: str, param: str | None, code: str | None = None) -> ApiError:
    """The request is invalid."""
    return ApiError(message, param=param, code=code)


def queue_full(waiting: int, retry_after_s: int) -> ApiError:
    """The queue has no room."""
    return ApiError(
        f"{waiting} answers are waiting already: try again in {retry_after_s} s",
        status=429,
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": str(retry_after_s)},
    )


def queue_timeout(waited_s: float, retry_after_s: int) -> ApiError:
    """The request waited too long for a row."""
    return ApiError(
        f"no row became free within {waited_s:g} s: try again in {retry_after_s} s",
        status=503,
        kind="server_error",
        code="queue_timeout",
        headers={"Retry-After": str(retry_after_s)},
    )


def request_timeout(limit_s: float) -> ApiError:
    """The request took too long."""
    return ApiError(
        f"the request took more than {limit_s:g} s: ask for fewer tokens",
        status=504,
        kind="server_error",
        code="timeout",
    )


def slow_client(events: int) -> ApiError:
    """The client reads its stream too slowly."""
    return ApiError(
        f"the client is {events} events behind: read the stream faster",
        status=408,
        kind="server_error",
        code="slow_client",
    )


def shutting_down() -> ApiError:
    """The server is shutting down."""
    return ApiError(
        "the server is shutting down: try again in a moment, or another server",
        status=503,
        kind="server_error",
        code="shutting_down",
        headers={"Retry-After": "5", "Connection": "close"},
    )
