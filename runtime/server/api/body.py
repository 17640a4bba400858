"""Strict JSON for the bodies of requests.

Python's own reader takes the last of two equal keys, and NaN. Either could hide a client's mistake
that changes the answer.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any, NoReturn

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from typing_extensions import override

__all__ = ["StrictRoute", "read_json"]


class StrictRoute(APIRoute):
    """A route whose bodies are read by :func:`read_json`."""

    @override
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_StrictRequest(request.scope, request.receive))

        return handle_strictly


class _StrictRequest(Request):
    @override
    async def json(self) -> Any:
        return read_json(await self.body())


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
