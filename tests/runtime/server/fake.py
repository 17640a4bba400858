"""An engine that a test controls, and a client of a server's application."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from eoracc.errors import PromptTooLongError, RequestError
from eoracc.runtime.decode.continuation import Listener
from eoracc.runtime.folder_watch import FolderChange
from eoracc.runtime.request import ChatOptions, FinishReason, Piece, Prompt, Request, TokenLogprob
from eoracc.runtime.server.app import create_app
from eoracc.runtime.server.middleware import Observe
from eoracc.runtime.server.options import ServerOptions
from eoracc.runtime.server.service import ServedModel, Service

__all__ = [
    "BACKBONE",
    "CHAT",
    "COMPLETIONS",
    "CONTEXT",
    "HI",
    "JSON",
    "FakeEngine",
    "FakeFolder",
    "FakeGeneration",
    "Server",
    "completion",
    "echo_prompt",
    "piece",
    "run",
    "serve",
    "settle",
]

BACKBONE = "backbone"
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}]}
JSON = {"Content-Type": "application/json"}
CONTEXT = 100
ADAPTERS = ("math", "prose")


def piece(text: str, finish_reason: FinishReason | None = None) -> Piece:
    """A piece of one token a byte."""
    return Piece(text, tuple(text.encode()), finish_reason=finish_reason)


@dataclass
class FakeGeneration:
    """A text that a test makes."""

    request: Request
    listener: Listener
    cancelled: bool = False

    def cancel(self) -> None:
        self.cancelled = True

    def say(self, *pieces: Piece) -> None:
        """Tell the listener, as the engine's thread would."""
        for piece in pieces:
            self.listener(piece)


@dataclass
class FakeEngine:
    """Records submitted requests; with ``reply`` it answers at once."""

    reply: Callable[[Request], Sequence[Piece]] | None = None
    generations: list[FakeGeneration] = field(default_factory=list)
    alive: bool = True

    def submit(self, request: Request, *, listener: Listener) -> FakeGeneration:
        if request.adapter == "prose" and request.seed == 13:
            raise RequestError("adapter 'prose': cannot be used with seed 13")
        generation = FakeGeneration(request, listener)
        self.generations.append(generation)
        if self.reply is not None:
            generation.say(*self.reply(request))
        return generation

    def close(self) -> None:
        self.alive = False

    @property
    def running(self) -> list[FakeGeneration]:
        """Generations that are not cancelled."""
        return [text for text in self.generations if not text.cancelled]


def echo_prompt(request: Request) -> list[Piece]:
    """The prompt in capitals, a letter at a time, with probabilities where they are wanted."""
    tokens = [int(token) for token in request.prompt]  # type: ignore[arg-type] # they are tokens
    pieces = []
    for number, token in enumerate(tokens[: request.max_new_tokens]):
        letter = bytes([token]).decode().upper()
        made = ord(letter)
        top = tuple((made + i, -float(i) - 0.5) for i in range(request.logprobs or 0))
        logprobs = (
            None if request.logprobs is None else (TokenLogprob(made, -0.5, top, offset=number),)
        )
        last = number + 1 == min(len(tokens), request.max_new_tokens)
        reason: FinishReason | None = None
        if last:
            reason = "length" if len(tokens) > request.max_new_tokens else "stop"
        pieces.append(Piece(letter, (made,), logprobs, reason))
    return pieces or [Piece("", finish_reason="length")]


@dataclass
class FakeFolder:
    """A folder that a test changes."""

    change: FolderChange | None = None
    added: tuple[str, ...] = ()

    def check(self) -> FolderChange | None:
        return self.change

    def explain_missing(self, adapter: str) -> str | None:
        return f"adapter '{adapter}': restart to use it" if adapter in self.added else None


class _Codec:
    """Bytes are tokens; a chat is its last turn, after the template's variable ``prefix``."""

    def encode_prompt(
        self, prompt: Prompt, *, options: ChatOptions | None = None, limit: int | None = None
    ) -> Sequence[int]:
        if isinstance(prompt, str):
            if limit is not None and len(prompt) > 4 * limit:
                raise PromptTooLongError("the prompt is longer than its tokens can be: shorten it")
            if prompt.startswith("slow"):
                time.sleep(0.5)
            return list(prompt.encode())
        if prompt and isinstance(prompt[0], int):
            return prompt  # type: ignore[return-value] # ints all
        message = prompt[-1]
        assert not isinstance(message, (int, str))
        if message["role"] == "assistant":
            raise RequestError("messages: the chat template refuses them: nobody is asking")
        kwargs = {} if options is None else options.template_kwargs
        return list(f"{kwargs.get('prefix', '')}{message['content']}".encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode()


@dataclass
class Server:
    """A server within the test's event loop."""

    engine: FakeEngine
    service: Service
    app: Observe
    client: httpx.AsyncClient

    async def post(self, path: str, /, **fields: object) -> httpx.Response:
        return await self.client.post(path, json=fields)

    async def metric(self, line: str) -> float:
        """The value of the metric whose name and labels are ``line``."""
        text = (await self.client.get("/metrics")).text
        for sample in text.splitlines():
            name, _, value = sample.rpartition(" ")
            if name == line:
                return float(value)
        return 0.0

    async def settled(self, line: str, value: float, *, limit_s: float = 5.0) -> float:
        """The metric ``line`` once it has ``value``, or what it has after ``limit_s``.

        An answer reaches its client before the server has counted it: on a busy machine the next
        request may come in between.
        """
        end = time.monotonic() + limit_s
        while (found := await self.metric(line)) != value and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return found


@asynccontextmanager
async def serve(
    engine: FakeEngine | None = None,
    *,
    rows: int = 2,
    folder: FakeFolder | None = None,
    **options: Any,  # noqa: ANN401
) -> AsyncIterator[Server]:
    """A server of ``engine``, which echoes by default."""
    engine = FakeEngine(echo_prompt) if engine is None else engine
    served = ServedModel(
        engine=engine,
        rows=rows,
        is_alive=lambda: engine.alive,
        codec=_Codec(),
        token_bytes={token: bytes([token]) for token in range(256)},
        context_length=CONTEXT,
        adapters=ADAPTERS,
        fingerprint="fp_0123",
        folder=FakeFolder() if folder is None else folder,
        close=engine.close,
    )
    service = Service(served, ServerOptions(**options), model_name=BACKBONE)
    app = create_app(service)
    transport = httpx.ASGITransport(app)
    headers = {"Authorization": f"Bearer {options.get('api_key') or ''}"}
    async with httpx.AsyncClient(
        transport=transport, base_url="http://test", headers=headers
    ) as client:
        yield Server(engine, service, app, client)
    service.close()


def run(test: Callable[[Server], Awaitable[None]], **options: Any) -> None:  # noqa: ANN401
    """Run a test with a server of its own; ``options`` are those of :func:`serve`."""

    async def inner() -> None:
        async with serve(**options) as server:
            await test(server)

    asyncio.run(inner())


def completion(**fields: object) -> bytes:
    """A body of ``/v1/completions``."""
    return json.dumps({"prompt": "hello", "max_tokens": 5} | fields).encode()


async def settle() -> None:
    """Let everything happen that waits for nothing but the loop and the text thread."""
    for _ in range(20):
        await asyncio.sleep(0.002)
