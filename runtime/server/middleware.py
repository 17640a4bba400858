"""Middleware that every request passes before its route, from the outside in."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import uuid
from contextlib import suppress
from http import HTTPStatus
from time import monotonic

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eoracc.errors import ApiError
from eoracc.printable import printable
from eoracc.runtime.server.api.errors import body_timeout
from eoracc.runtime.server.connections.quiet_log import ACCESS_LOGGER
from eoracc.runtime.server.record import RequestRecord
from eoracc.runtime.server.service import Service

__all__ = ["Gate", "Observe"]

_HEALTH_ROUTES = frozenset({"/health", "/health/live", "/health/ready"})

_ROUTES = _HEALTH_ROUTES | {
    "/metrics",
    "/openapi.json",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
}
_MODEL_ROUTE = "/v1/models/"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CLIENT_GONE = 499
_METHOD_CHARS = 16
_DISCARD_S = 1.0

_log = logging.getLogger("eoracc.server")
_access = logging.getLogger(ACCESS_LOGGER)


class Observe:
    """Outermost: assigns a request id, counts and logs requests, answers unexpected errors."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self.in_flight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = RequestRecord(_request_id(Headers(scope=scope)), _route(scope["path"]))
        record.attach(scope)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = record.id
            await send(message)

        self.in_flight += 1
        try:
            await self._app(scope, receive, send_named)
        except ApiError as error:
            record.code = error.code
            await _send_error(error, send_named)
        except Exception as error:  # noqa: BLE001 - a bug in one request must not end the server
            _log.error("request %s failed", record.id, exc_info=error)
            if record.status == _CLIENT_GONE:
                await _send_error(_internal_error(), send_named)
        finally:
            self.in_flight -= 1
            self._note(scope, record)

    def _note(self, scope: Scope, record: RequestRecord) -> None:
        seconds = monotonic() - record.arrived
        metrics = self._service.metrics
        metrics.requests.labels(record.route, str(record.status)).inc()
        metrics.request_seconds.labels(record.route).observe(seconds)
        client = scope.get("client")
        fields = {
            "id": record.id,
            "client": client[0] if client else None,
            "method": printable(scope["method"], _METHOD_CHARS),
            "route": record.route,
            "status": record.status,
            "latency_ms": _in_ms(seconds),
        }
        if record.code is not None:
            fields["code"] = record.code
        if record.model is not None:
            fields |= {
                "model": record.model,
                "adapter": record.adapter,
                "stream": record.stream,
                "choices": record.choices,
                "prompt_tokens": record.prompt_tokens,
                "completion_tokens": record.completion_tokens,
            }
            if record.first_token_s is not None:
                fields["first_token_ms"] = _in_ms(record.first_token_s)
        _access.info("request", extra={"fields": fields})


class Gate:
    """Checks the host, the API key, and the type, size and speed of the body."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        key = service.options.api_key
        self._key = None if key is None else _hash(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request.

        Raises:
          ApiError: the request is rejected.
        """
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            hosts = headers.getlist("host")
            # Browsers, which a foreign page could send here, always speak HTTP/1.1 or later.
            is_old = scope.get("http_version") == "1.0" and not hosts
            if self._service.options.hosts is not None and not is_old:
                self._service.options.hosts.check(hosts)
            if scope["path"] not in _HEALTH_ROUTES:
                self._check_key(headers)
            if scope["method"] == "POST" and scope["path"] in _ROUTES:
                body = _Body(receive)
                try:
                    self._service.check_open()
                    _check_type(headers)
                    whole = await self._read(headers, body)
                except ApiError:
                    await body.discard()
                    raise
                if whole is None:
                    return
                receive = _replay(whole, receive)
        await self._app(scope, receive, send)

    def _check_key(self, headers: Headers) -> None:
        if self._key is None:
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Comparing hashes takes the same time for every key, whatever its length.
        fits = hmac.compare_digest(_hash(given.strip().encode("latin-1")), self._key)
        if not (fits and scheme.lower() == "bearer"):
            raise ApiError(
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                status=HTTPStatus.UNAUTHORIZED,
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _read(self, headers: Headers, body: _Body) -> bytes | None:
        """Read the whole body; None if the client closes the connection."""
        limit = self._service.options.max_body_bytes
        options = self._service.options
        limit_s = min(options.connections.body_timeout_s, options.request_timeout_s)
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        whole = bytearray()
        try:
            async with asyncio.timeout(limit_s):
                while body.more:
                    part = await body.read()
                    if part is None:
                        return None
                    whole += part
                    if len(whole) > limit:
                        raise _too_large(limit)
        except TimeoutError:
            raise body_timeout(limit_s) from None
        return bytes(whole)


class _Body:
    """The body of a request, in parts as it arrives.

    Attributes:
      more: whether further parts follow.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.more = True

    async def read(self) -> bytes | None:
        """The next part; None if the client has closed the connection."""
        message = await self._receive()
        self.more = message.get("more_body", False)
        return None if message["type"] == "http.disconnect" else message.get("body", b"")

    async def discard(self) -> None:
        """Read and drop the rest, for a limited time.

        Closing a connection with unread bytes resets it, and the reset overtakes the answer: the
        client would see a broken connection instead of the error.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_S):
                while self.more:
                    await self.read()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A ``receive`` that first returns ``body``."""
    whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay


async def _send_error(error: ApiError, send: Send) -> None:
    """Send ``error`` as the response."""
    body = json.dumps(error.body(), ensure_ascii=False).encode()
    headers = MutableHeaders({"content-type": "application/json", **error.headers})
    headers["content-length"] = str(len(body))
    await send({"type": "http.response.start", "status": error.status, "headers": headers.raw})
    await send({"type": "http.response.body", "body": body})


def _check_type(headers: Headers) -> None:
    """Require JSON, which a web page of another origin cannot send without a preflight request."""
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            "the request's body must be JSON: send 'Content-Type: application/json'",
            status=HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
            code="unsupported_media_type",
            headers={"Connection": "close"},
        )


def _too_large(limit: int) -> ApiError:
    return ApiError(
        f"the request's body has more than {limit} bytes: shorten it",
        status=HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        code="body_too_large",
        headers={"Connection": "close"},
    )


def _internal_error() -> ApiError:
    return ApiError(
        "the server failed on this request: its log says why",
        status=HTTPStatus.INTERNAL_SERVER_ERROR,
        kind="server_error",
        code="internal_error",
    )


def _in_ms(seconds: float) -> float:
    return round(1000 * seconds, 1)


def _hash(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _route(path: str) -> str:
    """The label of a route; unknown paths share one, to bound the number of labels."""
    if path.startswith(_MODEL_ROUTE):
        return _MODEL_ROUTE + "{name}"
    return path if path in _ROUTES else "other"


def _request_id(headers: Headers) -> str:
    """The client's request id, if it is safe to log; else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
