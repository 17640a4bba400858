"""Metrics of a server for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

__all__ = ["Metrics"]

_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0)
_FIRST_TOKEN_S = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_REQUEST_S = (0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)


class Metrics:
    """The metrics of one server, with units in their names.

    Values of labels are chosen by the server, never by a client, so that their number stays small.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter(
            "eoracc_requests",
            "Requests by route and status; status 499: the client closed the connection",
            ("route", "status"),
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "eoracc_request_seconds",
            "From a request's arrival to the last byte of its answer",
            ("route",),
            buckets=_REQUEST_S,
            registry=self._registry,
        )
        self.connections_closed = Counter(
            "eoracc_connections_closed",
            "Connections that the server refused or cut, by reason",
            ("reason",),
            registry=self._registry,
        )
        self.answers = Counter(
            "eoracc_answers",
            "Answers (choices) by model and finish reason",
            ("model", "reason"),
            registry=self._registry,
        )
        self.prompt_tokens = Counter(
            "eoracc_prompt_tokens",
            "Tokens of prompts of answers that were started",
            ("model",),
            registry=self._registry,
        )
        self.completion_tokens = Counter(
            "eoracc_completion_tokens",
            "Generated tokens",
            ("model",),
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "eoracc_time_to_first_token_seconds",
            "From a request's arrival to an answer's first token, time in the queue included",
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self.token_seconds = Histogram(
            "eoracc_time_per_token_seconds",
            "Between two tokens of an answer",
            buckets=_TOKEN_S,
            registry=self._registry,
        )
        self.queue_seconds = Histogram(
            "eoracc_queue_seconds",
            "Time that answers waited for a row of the batch",
            buckets=_FIRST_TOKEN_S,
            registry=self._registry,
        )
        self.batch_rows = Histogram(
            "eoracc_batch_rows",
            "Rows in use when an answer gets a token",
            buckets=_ROWS,
            registry=self._registry,
        )

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Export the value that ``read`` returns at the time of a request for metrics."""
        Gauge(name, text, registry=self._registry).set_function(read)

    def render(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)
