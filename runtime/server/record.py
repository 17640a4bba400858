"""What is noted of a request while it is served, for log and metrics: nobody's text."""

from __future__ import annotations

import time
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["RequestRecord"]

_KEY = "eoracc.record"


@dataclass
class RequestRecord:
    """One request.

    Attributes:
      id: names it in the log and in the response's ``x-request-id``.
      route: path, ``other`` where nothing is served.
      arrived: by ``time.monotonic``.
      status: of the response; 499 where the client went away before there was one.
      model: that was asked for, once it is known to exist.
      stream: whether the answer is a stream.
      choices: answers.
      prompt_tokens: of all prompts.
      completion_tokens: of all answers.
      first_token_s: seconds from its arrival.
      code: of the error, if there was one.
    """

    id: str
    route: str
    arrived: float = field(default_factory=time.monotonic)
    status: int = 499
    model: str | None = None
    stream: bool = False
    choices: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token_s: float | None = None
    code: str | None = None

    def attach(self, scope: MutableMapping[str, Any]) -> None:
        """Let :meth:`of` find it."""
        scope[_KEY] = self

    @staticmethod
    def of(scope: MutableMapping[str, Any]) -> RequestRecord:
        """The record of the request that ``scope`` belongs to."""
        record: RequestRecord = scope[_KEY]
        return record
