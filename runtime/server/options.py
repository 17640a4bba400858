"""Options of a server."""

from __future__ import annotations

from dataclasses import dataclass, field

from eoracc.errors import ApiError
from eoracc.runtime.server.connections.limits import ConnectionLimits
from eoracc.runtime.server.hosts import HostRule

__all__ = ["ServerOptions"]


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Limits of a server, with their defaults.

    Attributes:
      api_key: bearer token that requests must have; None accepts every request.
      max_waiting: answers that may wait for a row of the batch.
      max_choices: answers to one request (prompts times ``n``).
      max_body_bytes: of a request.
      max_prompt_tokens: of one prompt; None for the limit of the context.
      max_tokens: of one answer; None for the limit of the context.
      queue_timeout_s: seconds that an answer may wait for a row.
      request_timeout_s: seconds from the request's arrival to the last byte of its answer.
      stream_buffer: unread events of a stream before its client counts as too slow.
      grace_s: seconds for running requests to finish at shutdown.
      connections: limits of connections.
      hosts: that the server answers to; None for all.
    """

    api_key: str | None = None
    max_waiting: int = 64
    max_choices: int = 8
    max_body_bytes: int = 1 << 20
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    queue_timeout_s: float = 30.0
    request_timeout_s: float = 300.0
    stream_buffer: int = 1024
    grace_s: float = 30.0
    connections: ConnectionLimits = field(default_factory=ConnectionLimits)
    hosts: HostRule | None = None

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key and self.api_key.isascii()):
            raise ApiError("the API key must be ASCII text of at least one character")
