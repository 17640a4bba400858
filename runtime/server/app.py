"""The routes: an OpenAI-compatible API in FastAPI."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from eoracc import __version__
from eoracc.errors import ApiError, error_body
from eoracc.printable import printable
from eoracc.runtime.server.api.body import StrictRoute
from eoracc.runtime.server.api.schemas import ChatCompletionRequest, CompletionRequest
from eoracc.runtime.server.middleware import Gate, Observe
from eoracc.runtime.server.record import RequestRecord
from eoracc.runtime.server.service import Service

__all__ = ["create_app"]

_SHOWN_CHARS = 64
"""Characters of a path that an error repeats."""


_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": description, "content": {"application/json": {"schema": _ERROR}}}
    for status, description in (("4XX", "The request is refused."), ("5XX", "The server failed."))
}
_UNHEALTHY: dict[int | str, dict[str, Any]] = {
    "5XX": {"description": "The server takes no requests.", "content": {"application/json": {}}}
}
_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}}
}


def create_app(service: Service) -> Observe:
    """The ASGI application of ``service``, with all middleware."""
    # No documentation pages: FastAPI's load scripts from other servers.
    app = FastAPI(title="eoracc", version=__version__, docs_url=None, redoc_url=None)
    app.router.route_class = StrictRoute
    _add_errors(app)
    _add_generation(app, service)
    _add_models(app, service)
    _add_operations(app, service)
    return Observe(Gate(app, service), service)


def _add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/completions", responses=_ANSWER | _ERRORS, tags=["text"])
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue text."""
        return await service.complete(body, RequestRecord.of(request.scope))

    @app.post("/v1/chat/completions", responses=_ANSWER | _ERRORS, tags=["text"])
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer in a chat."""
        return await service.chat(body, RequestRecord.of(request.scope))


def _add_models(app: FastAPI, service: Service) -> None:
    @app.head("/v1/models", include_in_schema=False)
    @app.get("/v1/models", responses=_ERRORS, tags=["models"])
    async def models() -> dict[str, Any]:
        """List the backbone and its adapters."""
        return service.catalog.as_dict()

    @app.head("/v1/models/{name:path}", include_in_schema=False)
    @app.get("/v1/models/{name:path}", responses=_ERRORS, tags=["models"])
    async def model(name: str) -> dict[str, Any]:
        """Describe one of the models."""
        return service.catalog.card(name)


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.head("/health/live", include_in_schema=False)
    @app.get("/health/live", responses=_UNHEALTHY, tags=["operation"])
    async def live() -> Response:
        """Whether the process works: 500 once the engine has failed."""
        if service.alive:
            return JSONResponse({"status": "live"})
        return JSONResponse({"status": "failed"}, HTTPStatus.INTERNAL_SERVER_ERROR)

    @app.head("/health", include_in_schema=False)
    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health", responses=_UNHEALTHY, tags=["operation"])
    @app.get("/health/ready", responses=_UNHEALTHY, tags=["operation"])
    async def ready() -> Response:
        """Whether requests are accepted: 503 while shutting down."""
        if service.draining:
            status, code = "draining", HTTPStatus.SERVICE_UNAVAILABLE
        elif not service.alive:
            status, code = "failed", HTTPStatus.SERVICE_UNAVAILABLE
        else:
            status, code = "ready", HTTPStatus.OK
        artifact = "changed" if service.folder_changed else "loaded"
        return JSONResponse({"status": status, "artifact": artifact}, code)

    @app.head("/metrics", include_in_schema=False)
    @app.get("/metrics", response_class=PlainTextResponse, responses=_ERRORS, tags=["operation"])
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.render(), media_type=service.metrics.content_type)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        RequestRecord.of(request.scope).code = "invalid_request"
        message, param = _first_problem(error.errors())
        return JSONResponse(
            error_body(message, kind="invalid_request_error", param=param),
            HTTPStatus.BAD_REQUEST,
        )

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        RequestRecord.of(request.scope).code = error.code
        return JSONResponse(error.body(), error.status, dict(error.headers))

    @app.exception_handler(HTTPException)
    async def not_served(request: Request, error: HTTPException) -> Response:
        method, path = (
            printable(text, _SHOWN_CHARS) for text in (request.method, request.url.path)
        )
        message = {
            HTTPStatus.NOT_FOUND: f"there is no {method} {path} here",
            HTTPStatus.METHOD_NOT_ALLOWED: (
                f"{path} does not take {method}: use "
                f"{(error.headers or {}).get('Allow', 'another method')}"
            ),
        }.get(HTTPStatus(error.status_code), str(error.detail))
        return JSONResponse(
            error_body(message, kind="invalid_request_error"), error.status_code, error.headers
        )


def _first_problem(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """The first error of pydantic as a sentence, and its field."""
    error = errors[0]
    if error["type"] == "json_invalid":
        reason = error.get("ctx", {}).get("error", "it cannot be read")
        return f"the body is not valid JSON: {reason} at character {error['loc'][-1]}", None
    location = error["loc"][1:]
    if not location:
        return "the body must be a JSON object", None
    # After the field, pydantic names the member of a union, which does not help a client.
    param = ".".join(str(part) for part in location if _is_field(part))
    text = str(error["msg"]).removeprefix("Value error, ")
    return f"{param}: {text[0].lower()}{text[1:]}", param


def _is_field(part: object) -> bool:
    return isinstance(part, int) or (isinstance(part, str) and part.isidentifier())
