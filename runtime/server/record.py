"""The record of a request for log and metrics, without any of its text."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from eoracc.runtime.request import AdapterChoice

__all__ = ["RequestRecord"]

_KEY = "eoracc.record"


@dataclass
class RequestRecord:
    """One request.

    Attributes:
      id: in the log and in the response's ``x-request-id``.
      route: path, or ``other`` for an unknown path.
      arrived: by ``time.monotonic``.
      status: of the response; 499 if the client closed the connection before it.
      model: name in the request, once it is known to exist.
      adapter: its name, or weights by name; None for the backbone alone.
      stream: whether the answer is a stream.
      choices: number of answers.
      prompt_tokens: of all prompts.
      completion_tokens: of all answers.
      first_token_s: seconds from the arrival to the first token.
      code: of the error, if any.
    """

    id: str
    route: str
    arrived: float = field(default_factory=time.monotonic)
    status: int = 499
    model: str | None = None
    adapter: AdapterChoice = None
    stream: bool = False
    choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    code: str | None = None

    def attach(self, scope: MutableMapping[str, Any]) -> None:
        """Store the record in ``scope`` for :meth:`of`."""
        scope[_KEY] = self

    @staticmethod
    def of(scope: MutableMapping[str, Any]) -> RequestRecord:
        """The record in ``scope``."""
        record: RequestRecord = scope[_KEY]
        return record
