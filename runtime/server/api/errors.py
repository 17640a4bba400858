"""Errors of the API, in the form of OpenAI's API.

The body is ``{"error": {"message", "type", "param", "code"}}``; the message is one sentence.
"""

from __future__ import annotations

from eoracc.errors import ApiError

__all__ = [
    "bad_request",
    "body_timeout",
    "header_timeout",
    "queue_full",
    "queue_timeout",
    "request_timeout",
    "shutting_down",
    "slow_client",
    "too_many_connections",
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


def header_timeout(limit_s: float) -> ApiError:
    """The request's headers are not complete in time."""
    return ApiError(
        f"the request's headers did not arrive within {limit_s:g} s: send them faster",
        status=408,
        code="timeout",
        headers={"Connection": "close"},
    )


def body_timeout(limit_s: float) -> ApiError:
    """The request's body is not complete in time."""
    return ApiError(
        f"the request's body did not arrive within {limit_s:g} s: send it faster",
        status=408,
        code="timeout",
        headers={"Connection": "close"},
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


def too_many_connections(limit: int, address: str | None = None) -> ApiError:
    """There is no room for a further connection, from one address or at all."""
    origin = "" if address is None else f" from {address}"
    return ApiError(
        f"{limit} connections{origin} are open already, all with requests: try again in a moment",
        status=503,
        kind="server_error",
        code="too_many_connections",
        headers={"Retry-After": "1", "Connection": "close"},
    )
