"""Strict JSON for the bodies of requests.

Python's own reader takes the last of two equal keys, and NaN. Either could hide a client's mistake
that changes the answer.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache
from http import HTTPStatus
from typing import Any, NoReturn, get_type_hints

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from typing_extensions import override

from eoracc.runtime.server.api.schemas import Fields

__all__ = ["StrictRoute", "read_json"]

_LARGE_BODY = 1 << 14
"""Bytes that take milliseconds to read."""


class StrictRoute(APIRoute):
    """A route whose bodies are read by :func:`read_json`.

    A large body is read in a thread: reading it may take a second, and the event loop has streams
    to serve.
    """

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        model = get_type_hints(self.endpoint).get("body")

        async def handle_strictly(request: Request) -> Response:
            strict = _StrictRequest(request.scope, request.receive)
            if isinstance(model, type) and issubclass(model, Fields):
                await strict.read(model)
            return await handle(strict)

        return handle_strictly


class _StrictRequest(Request):
    _fields: Fields | None = None

    async def read(self, model: type[Fields]) -> None:
        """Read the body as ``model``.

        Raises:
          HTTPException, RequestValidationError, ApiError: it is none.
        """
        body = await self.body()
        if not body:
            return  # FastAPI says so
        if len(body) < _LARGE_BODY:
            self._fields = _read_fields(body, model)
        else:
            loop = asyncio.get_running_loop()
            self._fields = await loop.run_in_executor(_thread(), _read_fields, body, model)

    @override
    async def json(self) -> Any:
        return self._fields  # which FastAPI takes as it is


@lru_cache(maxsize=1)
def _thread() -> Executor:
    """The thread for large bodies: one after the other, so that they take one processor at most."""
    return ThreadPoolExecutor(1, thread_name_prefix="eoracc-bodies")


def _read_fields(body: bytes, model: type[Fields]) -> Fields:
    try:
        fields = model.model_validate(read_json(body))
    except json.JSONDecodeError as error:
        problem: dict[str, object] = {
            "type": "json_invalid",
            "loc": ("body", error.pos),
            "msg": "JSON decode error",
            "input": {},
            "ctx": {"error": error.msg},
        }
        raise RequestValidationError([problem]) from None
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        problem = dict(first, loc=("body", *first["loc"]))
        raise RequestValidationError([problem]) from None
    fields.refuse_unread()
    return fields


def read_json(body: bytes) -> object:
    """The value of a body.

    Raises:
      JSONDecodeError: it is not JSON.
      HTTPException: 400: it repeats a key, is not UTF-8, or holds a number or a depth that cannot
        be represented.
    """
    try:
        return json.loads(
            body.decode("utf-8-sig"), object_pairs_hook=_object, parse_constant=_refuse_constant
        )
    except json.JSONDecodeError:
        raise
    except UnicodeDecodeError:
        _refuse("the body is not UTF-8 text: send JSON in UTF-8")
    except RecursionError:
        _refuse("the body is nested too deeply: send a flat object")
    except ValueError:
        _refuse("the body holds a number of too many digits: shorten it")


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    for name, _ in pairs:
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            _refuse(f"the body has a field {ascii(name)[:64]}, which is not valid Unicode: mend it")
    members = dict(pairs)
    if len(members) < len(pairs):
        ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
        _refuse(f"the body gives {ascii(repeated)[:64]} twice: give it once")
    return members


def _refuse_constant(text: str) -> NoReturn:
    _refuse(f"the body is not valid JSON: {text} is no number in JSON")


def _refuse(message: str) -> NoReturn:
    raise HTTPException(HTTPStatus.BAD_REQUEST, message)
