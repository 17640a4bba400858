"""The clients of :mod:`benchmarks.soak`: kinds of requests, and what counts as a failure."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

__all__ = ["KINDS", "ODD_BODIES", "Clients", "Outcome"]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPTS = ("a state of the union", "The people", "b", "1 + 1 =", "x y z " * 8, "congress " * 8)
TOKENS = (1, 8, 24)
REFUSALS = range(400, 500)
BUSY = frozenset({429, 503})
"""The server refuses a request for now, and says so: no failure, but no answer either."""

ODD_BODIES: tuple[bytes, ...] = (
    b"",
    b"{",
    b"null",
    b"[" * 5000,
    b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "a", "temperature": NaN}',
    b'{"prompt": "a", "temperature": 1e38}',
    b'{"prompt": "a", "n": 1' + b"0" * 400 + b"}",
    b'{"prompt": "a", "max_tokens": 1e38}',
    b'{"prompt": "a", "adapters": {"none-such": 1}}',
    b'{"prompt": "a", "model": "\\u001b[2J"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": [1000000000000]}',
    b'{"prompt": "a", "no_such_field": true}',
    b'{"prompt": "' + b" " * 300_000 + b'x"}',
    b'{"messages": []}',
)
"""Requests that the server must refuse, each with a status of 400 to 499."""


@dataclass(frozen=True)
class Outcome:
    """What became of one request.

    Attributes:
      kind: out of :data:`KINDS`.
      latency_ms: to the last byte; None where there is none: refused for now, cancelled.
      tokens: of the answers.
      failure: what went wrong; None if nothing did.
      busy: whether the server refused the request for now.
    """

    kind: str
    latency_ms: float | None = None
    tokens: int = 0
    failure: str | None = None
    busy: bool = False


Ask = tuple[str, int, str | None]
"""Prompt, tokens and adapter of a greedy request."""


class Clients:
    """Sends requests of all kinds, drawn with a seed, and checks the answers.

    A greedy answer must be the text that the same request got from the idle server.
    """

    def __init__(self, client: httpx.AsyncClient, adapters: Sequence[str], seed: int) -> None:
        """Prepare.

        Args:
          client: of the server.
          adapters: that the server has.
          seed: of the choice of requests.
        """
        self._client = client
        self._adapters = adapters
        self._rng = np.random.default_rng(seed)
        self._wanted: dict[Ask, str] = {}

    async def learn(self) -> None:
        """Ask every greedy request once, alone."""
        for adapter in (None, *self._adapters):
            for prompt in PROMPTS:
                for tokens in TOKENS:
                    ask = (prompt, tokens, adapter)
                    answer = await self._client.post(COMPLETIONS, json=_body(ask))
                    answer.raise_for_status()
                    self._wanted[ask] = answer.json()["choices"][0]["text"]

    async def send(self, kind: str) -> Outcome:
        """One request of a kind; never raises."""
        begin = time.perf_counter()
        try:
            outcome = await KINDS[kind](self)
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            return Outcome(kind, failure=f"lost answer ({type(error).__name__})")
        latency_ms = 1000 * (time.perf_counter() - begin)
        unmeasured = outcome.busy or kind == "cancelled"
        return Outcome(
            kind, None if unmeasured else latency_ms, outcome.tokens, outcome.failure, outcome.busy
        )

    # --- kinds ------------------------------------------------------------------------------------

    async def whole(self) -> Outcome:
        """A greedy completion."""
        ask = self._draw()
        answer = await self._client.post(COMPLETIONS, json=_body(ask))
        return self._judge("whole", answer, lambda body: _text(body) == self._wanted[ask])

    async def chat(self) -> Outcome:
        """A sampled chat."""
        messages = [{"role": "user", "content": self._draw()[0]}]
        body = {"messages": messages, "max_tokens": 8, "seed": int(self._rng.integers(1000))}
        return self._judge("chat", await self._client.post(CHAT, json=body))

    async def several(self) -> Outcome:
        """Two answers to each of two prompts."""
        body = {"prompt": list(PROMPTS[:2]), "n": 2, "max_tokens": 8}
        answer = await self._client.post(COMPLETIONS, json=body)
        return self._judge("several", answer, lambda body: len(body["choices"]) == 4)

    async def summed(self) -> Outcome:
        """A sum of adapters, with weights that no request had before."""
        weights = {name: float(self._rng.normal()) for name in self._adapters}
        body = {"prompt": self._draw()[0], "max_tokens": 8, "adapters": weights}
        return self._judge("summed", await self._client.post(COMPLETIONS, json=body))

    async def streamed(self) -> Outcome:
        """A greedy stream, read to its end."""
        ask = self._draw()
        text, tokens, ended = "", 0, False
        body = _body(ask) | {"stream": True, "stream_options": {"include_usage": True}}
        async with self._client.stream("POST", COMPLETIONS, json=body) as response:
            if response.status_code != httpx.codes.OK:
                await response.aread()
                return self._judge("streamed", response)
            async for line in response.aiter_lines():
                ended = ended or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    return Outcome("streamed", failure=f"error event {event['error']['code']}")
                text += "".join(choice["text"] for choice in event["choices"])
                tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if not ended:
            return Outcome("streamed", failure="lost answer (no end)")
        wrong = None if text == self._wanted[ask] else "wrong answer"
        return Outcome("streamed", tokens=tokens, failure=wrong)

    async def cancelled(self) -> Outcome:
        """A stream whose client leaves after a while, or before the first token."""
        body = _body((PROMPTS[4], 64, None)) | {"stream": True}
        try:
            async with asyncio.timeout(float(self._rng.uniform(0.005, 0.2))):
                async with self._client.stream("POST", COMPLETIONS, json=body) as response:
                    async for _ in response.aiter_lines():
                        pass
        except TimeoutError:
            pass
        return Outcome("cancelled")

    async def odd(self) -> Outcome:
        """A request that must be refused."""
        content = ODD_BODIES[int(self._rng.integers(len(ODD_BODIES)))]
        headers = {"Content-Type": "application/json"}
        answer = await self._client.post(COMPLETIONS, content=content, headers=headers)
        if answer.status_code in BUSY:
            return Outcome("odd", busy=True)
        refused = answer.status_code in REFUSALS and bool(answer.json()["error"]["message"])
        return Outcome("odd", failure=None if refused else f"status {answer.status_code}")

    async def observed(self) -> Outcome:
        """What a monitor reads."""
        path = ("/health", "/metrics", "/v1/models")[int(self._rng.integers(3))]
        answer = await self._client.get(path)
        failure = None if answer.is_success else f"status {answer.status_code}"
        return Outcome("observed", failure=failure)

    # --- parts ------------------------------------------------------------------------------------

    def _draw(self) -> Ask:
        asks = list(self._wanted)
        return asks[int(self._rng.integers(len(asks)))]

    def _judge(
        self,
        kind: str,
        answer: httpx.Response,
        fits: Callable[[Mapping[str, Any]], bool] = lambda _: True,
    ) -> Outcome:
        if answer.status_code in BUSY:
            return Outcome(kind, busy=True)
        if answer.status_code != httpx.codes.OK:
            return Outcome(kind, failure=f"status {answer.status_code}")
        body = answer.json()
        tokens = body["usage"]["completion_tokens"]
        return Outcome(kind, tokens=tokens, failure=None if fits(body) else "wrong answer")


KINDS: Mapping[str, Callable[[Clients], Awaitable[Outcome]]] = {
    "whole": Clients.whole,
    "streamed": Clients.streamed,
    "chat": Clients.chat,
    "several": Clients.several,
    "summed": Clients.summed,
    "cancelled": Clients.cancelled,
    "odd": Clients.odd,
    "observed": Clients.observed,
}
"""Kinds of requests by name."""


def _body(ask: Ask) -> dict[str, Any]:
    prompt, tokens, adapter = ask
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    return body if adapter is None else body | {"model": adapter}


def _text(body: Mapping[str, Any]) -> str:
    text: str = body["choices"][0]["text"]
    return text
