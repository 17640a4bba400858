"""The service behind the routes: from a request of the API to requests of the engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from typing_extensions import TypeIs

from eoracc.errors import ApiError, ArtifactError, PromptTooLongError, RequestError
from eoracc.runtime.request import AdapterChoice, ChatOptions, Prompt, Request
from eoracc.runtime.server.admission import Admission
from eoracc.runtime.server.api.errors import bad_request, queue_timeout, shutting_down
from eoracc.runtime.server.api.responses import Answer, ChatForm, Choice, CompletionForm, Form
from eoracc.runtime.server.api.schemas import (
    ChatCompletionRequest,
    ChatMessage,
    CompletionRequest,
    GenerationFields,
)
from eoracc.runtime.server.metrics import Metrics
from eoracc.runtime.server.options import ServerOptions
from eoracc.runtime.server.record import RequestRecord
from eoracc.runtime.server.replies import TextReply
from eoracc.runtime.server.served.catalog import Catalog
from eoracc.runtime.server.served.folder_monitor import FolderMonitor, SupportsFolderWatch
from eoracc.runtime.server.served_request import ServedRequest, ServingContext, SupportsSubmit
from eoracc.runtime.server.text_threads import TextThreads

__all__ = ["Codec", "ServedModel", "Service"]

_COMPLETION_TOKENS = 16
"""Default of ``max_tokens`` in OpenAI's API for completions."""


class Codec(Protocol):
    """Converts between text and tokens. Called from several threads, not the event loop's."""

    def encode_prompt(
        self, prompt: Prompt, /, *, options: ChatOptions | None = None, limit: int | None = None
    ) -> Sequence[int]:
        """Tokens of a text or of messages; tokens are returned as they are.

        Args:
          prompt: to encode.
          options: how messages become text.
          limit: tokens that there is room for; a text that surely has more is refused.

        Raises:
          PromptTooLongError: the text has more bytes than ``limit`` tokens can hold.
          RequestError: the chat template rejects the messages.
          ArtifactError: there is no chat template, or it is not valid.
        """

    def decode(self, tokens: Sequence[int], /) -> str:
        """The text of ``tokens``."""


@dataclass(frozen=True)
class ServedModel:
    """An opened artifact.

    Attributes:
      engine: generates texts.
      rows: number of texts that the engine generates at a time.
      is_alive: whether the engine works.
      codec: the tokenizer.
      token_bytes: bytes of each token.
      context_length: most tokens of a prompt and its answer.
      adapters: names of the adapters.
      fingerprint: identifies the artifact's content.
      folder: tells whether the artifact's folder still holds what was loaded.
      close: ends the engine.
    """

    engine: SupportsSubmit
    rows: int
    is_alive: Callable[[], bool]
    codec: Codec
    token_bytes: Mapping[int, bytes]
    context_length: int
    adapters: Sequence[str]
    fingerprint: str
    folder: SupportsFolderWatch
    close: Callable[[], object]


class Service:
    """The service behind the routes, in one event loop.

    Attributes:
      options: limits.
      metrics: of the server.
      catalog: names of the models.
      admission: rows of the engine and the queue before them.
      draining: whether new requests are rejected.
    """

    def __init__(self, served: ServedModel, options: ServerOptions, *, model_name: str) -> None:
        """Serve ``served`` under ``model_name``.

        Raises:
          ApiError: an adapter has this name.
        """
        self.options = options
        self.draining = False
        self.catalog = Catalog(
            model_name,
            served.adapters,
            explain_missing=served.folder.explain_missing,
            context_length=served.context_length,
            created=int(time.time()),
        )
        self.admission = Admission(served.rows, options.max_waiting)
        self.metrics = Metrics()
        self._served = served
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="eoracc-submit")
        self._texts = TextThreads()
        self._running: set[ServedRequest] = set()
        self._context = ServingContext(
            served.engine, self._thread, self.admission, self.metrics, options, self._running
        )
        self._folder = FolderMonitor(served.folder)
        gauges = self.admission
        self.metrics.gauge(
            "eoracc_queue_length", "Answers that wait for a row", lambda: gauges.waiting
        )
        self.metrics.gauge("eoracc_active_rows", "Answers in generation", lambda: gauges.active)
        self.metrics.gauge(
            "eoracc_artifact_changed",
            "1 once the artifact's folder no longer holds what was loaded from it",
            lambda: self.folder_changed,
        )

    @property
    def alive(self) -> bool:
        """Whether the engine works."""
        return self._served.is_alive()

    @property
    def folder_changed(self) -> bool:
        """Whether the artifact's folder no longer holds what was loaded from it."""
        return self._folder.changed

    def check_open(self) -> None:
        """Check, before the body is read, whether a request can be accepted.

        Raises:
          ApiError: 503 while shutting down, 429 where the queue is full.
        """
        if self.draining:
            raise shutting_down()
        self.admission.check_room()

    def abort(self) -> None:
        """End all running requests with an error to their clients."""
        for request in list(self._running):
            request.fail(shutting_down())

    def close(self) -> None:
        """End the threads. No request may be running."""
        self._folder.close()
        self._texts.close()
        self._thread.shutdown()
        self._served.close()

    async def complete(self, body: CompletionRequest, record: RequestRecord) -> TextReply:
        """``POST /v1/completions``.

        Raises:
          ApiError: the request is rejected.
        """
        if body.echo and body.logprobs is not None:
            raise bad_request(
                "echo: is not supported together with logprobs: leave one out",
                "echo",
                "unsupported",
            )
        max_tokens = _COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        return await self._reply(
            body, record, body.prompts, max_tokens, body.logprobs, CompletionForm
        )

    async def chat(self, body: ChatCompletionRequest, record: RequestRecord) -> TextReply:
        """``POST /v1/chat/completions``.

        Raises:
          ApiError: the request is rejected.
        """
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs: needs logprobs to be true", "top_logprobs")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        messages = await self._texts.run(_as_dicts, body.messages)
        max_tokens = _one_of(body, "max_completion_tokens", "max_tokens")
        try:
            options = body.chat_options()
        except RequestError as error:
            raise bad_request(str(error), "continue_final_message") from None
        return await self._reply(
            body, record, [messages], max_tokens, logprobs, ChatForm, chat_options=options
        )

    async def _reply(
        self,
        body: GenerationFields,
        record: RequestRecord,
        prompts: Sequence[Prompt],
        max_tokens: int | None,
        logprobs: int | None,
        form: Callable[[Answer], Form],
        *,
        chat_options: ChatOptions | None = None,
    ) -> TextReply:
        name, adapter = self.catalog.resolve(body.model, body.adapters)
        self._check_tokens("stop_token_ids", body.stop_token_ids or ())
        self._check_tokens("logit_bias", body.token_biases)
        copies = body.n or 1
        count = len(prompts) * copies
        most = min(self.options.max_choices, self.admission.size)
        if count > most:
            raise bad_request(f"n: {count} answers exceed the limit of {most}: ask for fewer", "n")
        places = self.admission.enter(count)
        try:
            cut = partial(self._truncated, kept=body.truncate_prompt_tokens, max_tokens=max_tokens)
            truncates = body.truncate_prompt_tokens is not None
            if truncates:
                prompts = [cut(prompt) if _is_tokens(prompt) else prompt for prompt in prompts]
            encoded = [
                cut(tokens)
                for tokens in await self._encode(prompts, chat_options, truncates=truncates)
            ]
            echo = isinstance(body, CompletionRequest) and bool(body.echo)
            prefixes = await self._decode(encoded) if echo else []
            requests = [
                self._request(body, tokens, adapter, max_tokens, logprobs, copy)
                for tokens in encoded
                for copy in range(copies)
            ]
        except BaseException:
            for place in places:
                place.leave()
            raise
        lengths = [len(tokens) for tokens in encoded for _ in range(copies)]
        record.model, record.adapter = name, adapter
        record.stream, record.choices = bool(body.stream), count
        record.prompt_tokens = sum(map(len, encoded))
        served_request = ServedRequest(
            self._context,
            requests,
            places,
            model=name,
            prompt_tokens=lengths,
            arrived=record.arrived,
        )
        answer = Answer(
            model=name,
            created=int(time.time()),
            fingerprint=self._served.fingerprint,
            token_bytes=lambda token: self._served.token_bytes.get(token, b""),
            include_usage=body.include_usage,
            with_logprobs=logprobs is not None,
            prefixes=[prefix for prefix in prefixes for _ in range(copies)],
        )
        choices = [
            Choice(length, counts_prompt=index % copies == 0)
            for index, length in enumerate(lengths)
        ]
        return TextReply(served_request, form(answer), choices, stream=record.stream)

    def _request(
        self,
        body: GenerationFields,
        tokens: Sequence[int],
        adapter: AdapterChoice,
        max_tokens: int | None,
        logprobs: int | None,
        copy: int,
    ) -> Request:
        most = self._answer_length(len(tokens), max_tokens)
        least = body.min_tokens or 0
        if least > most:
            raise bad_request(
                f"min_tokens: {least} exceeds the {most} tokens that the answer may have: "
                "lower it or raise max_tokens",
                "min_tokens",
            )
        return Request(
            prompt=tokens,
            adapter=adapter,
            max_new_tokens=most,
            min_new_tokens=least,
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(body.top_k or 0, 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            min_p=body.min_p or 0.0,
            # OpenAI's API allows negative seeds, and the answers to one request must differ.
            seed=None if body.seed is None else (body.seed + copy) % 2**63,
            stop=body.stop_strings,
            stop_token_ids=tuple(body.stop_token_ids or ()),
            include_stop=bool(body.include_stop_str_in_output),
            bad_words=tuple(body.bad_words or ()),
            logit_bias=body.token_biases,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=_one_of(body, "repetition_penalty", "repeat_penalty") or 1.0,
            logprobs=logprobs,
            ignore_end=bool(body.ignore_eos),
        )

    @property
    def _longest_prompt(self) -> int:
        """Most tokens of a prompt, which leave room for one of the answer."""
        longest = self._served.context_length - 1
        return min(longest, self.options.max_prompt_tokens or longest)

    def _too_long(self, size: str) -> ApiError:
        return bad_request(
            f"the prompt has {size}, {self._longest_prompt} are allowed: shorten it",
            "prompt",
            "context_length_exceeded",
        )

    def _answer_length(self, prompt_tokens: int, max_tokens: int | None) -> int:
        """Most tokens to generate after a prompt.

        Raises:
          ApiError: the prompt or ``max_tokens`` is too long.
        """
        context, limit = self._served.context_length, self.options.max_tokens
        if not prompt_tokens:
            raise bad_request("the prompt is empty: give some text", "prompt")
        if prompt_tokens > self._longest_prompt:
            raise self._too_long(f"{prompt_tokens} tokens")
        left = context - prompt_tokens
        if max_tokens is None:
            return min(left, limit or left)
        if limit is not None and max_tokens > limit:
            raise bad_request(
                f"max_tokens: {max_tokens} exceeds the limit of {limit}: ask for fewer",
                "max_tokens",
            )
        if max_tokens > left:
            raise bad_request(
                f"max_tokens: the prompt's {prompt_tokens} and {max_tokens} more exceed the "
                f"model's {context} tokens: ask for {left} at most",
                "max_tokens",
                "context_length_exceeded",
            )
        return max_tokens

    def _truncated(
        self, tokens: Sequence[int], kept: int | None, max_tokens: int | None
    ) -> Sequence[int]:
        """The last ``kept`` tokens of a prompt; -1 for as many as leave room for the answer."""
        if kept is None:
            return tokens
        if kept < 0:
            context = self._served.context_length
            longest = self.options.max_prompt_tokens or context
            kept = max(0, min(longest, context - max(max_tokens or 0, 1)))
        return tokens[max(0, len(tokens) - kept) :]

    def _check_tokens(self, name: str, tokens: Iterable[int]) -> None:
        """Refuse tokens that the model does not have."""
        unknown = next((token for token in tokens if token not in self._served.token_bytes), None)
        if unknown is not None:
            raise bad_request(f"{name}: there is no token {unknown}", name)

    async def _encode(
        self,
        prompts: Sequence[Prompt],
        chat_options: ChatOptions | None,
        *,
        truncates: bool,
    ) -> list[Sequence[int]]:
        """Tokens of each prompt.

        Raises:
          ApiError: a prompt is refused, or waits too long for its turn.
        """
        limit = None if truncates else self._longest_prompt
        encode = partial(self._served.codec.encode_prompt, options=chat_options, limit=limit)
        encoded: list[Sequence[int]] = []
        for prompt in prompts:
            if limit is not None and _is_tokens(prompt) and len(prompt) > limit:
                raise self._too_long(f"{len(prompt)} tokens")
            try:
                async with asyncio.timeout(self.options.queue_timeout_s):
                    tokens = await self._texts.run(encode, prompt)
            except TimeoutError:
                raise queue_timeout(
                    self.options.queue_timeout_s, self.admission.retry_after_s
                ) from None
            except PromptTooLongError as error:
                raise bad_request(str(error), "prompt", "context_length_exceeded") from None
            except RequestError as error:
                raise bad_request(str(error), _field_of(error)) from None
            except ArtifactError:
                raise bad_request(
                    f"'{self.catalog.backbone}' has no chat template that can be used: use "
                    "/v1/completions",
                    "messages",
                ) from None
            if _is_tokens(prompt):
                self._check_tokens("prompt", tokens)
            encoded.append(tokens)
        return encoded

    async def _decode(self, encoded: Sequence[Sequence[int]]) -> list[str]:
        return [await self._texts.run(self._served.codec.decode, tokens) for tokens in encoded]


def _as_dicts(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    return [message.as_dict() for message in messages]


def _is_tokens(prompt: Prompt) -> TypeIs[Sequence[int]]:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], int)


def _field_of(error: RequestError) -> str:
    """The field of a chat request that an error begins with."""
    name = str(error).partition(":")[0]
    return name if name in ChatCompletionRequest.model_fields else "messages"


def _one_of(body: GenerationFields, name: str, other: str) -> Any:  # noqa: ANN401 - of any field
    """The value of a field that has two names; None if neither is given.

    Raises:
      ApiError: both are given, and differ.
    """
    first, second = getattr(body, name), getattr(body, other)
    if first is not None and second is not None and first != second:
        raise bad_request(f"{other}: {second} contradicts {name}: give one of them", other)
    return second if first is None else first
