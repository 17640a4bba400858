"""Bodies of responses, whole and in chunks, in the form of OpenAI's API."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from eoracc.runtime.request import FinishReason, Piece, TokenLogprob

__all__ = ["Answer", "ChatForm", "Choice", "CompletionForm", "Form", "TokenBytes", "sse_event"]

_FINAL = b"data: [DONE]\n\n"
_IMPOSSIBLE = -9999.0
"""Value for the logarithm of 0, which JSON lacks; OpenAI's API returns the same."""


def sse_event(body: object) -> bytes:
    """``body`` as one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


@dataclass
class Choice:
    """One answer, as far as generated.

    Attributes:
      prompt_tokens: length of its prompt.
      counts_prompt: whether it is the first answer to its prompt, which usage counts once.
      text: generated so far.
      tokens: number of generated tokens.
      logprobs: of the tokens, if requested.
      finish_reason: None until the answer has ended.
    """

    prompt_tokens: int
    counts_prompt: bool = True
    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: Piece) -> None:
        """Append ``piece``."""
        self.text += piece.text
        self.tokens += len(piece.tokens)
        self.logprobs += piece.logprobs or ()
        self.finish_reason = piece.finish_reason


class TokenBytes(Protocol):
    """The bytes of tokens."""

    def __call__(self, token: int, /) -> bytes:
        """The bytes of ``token``; a character may take several tokens."""


@dataclass
class Answer:
    """Properties that all bodies of one response share.

    Attributes:
      model: name in the request.
      created: seconds since 1970.
      fingerprint: identifies the artifact's content.
      token_bytes: for logprobs.
      include_usage: end a stream with a count of tokens.
      with_logprobs: report probabilities.
      prefixes: text before each answer: its prompt, if echoed.
    """

    model: str
    created: int
    fingerprint: str
    token_bytes: TokenBytes
    include_usage: bool = False
    with_logprobs: bool = False
    prefixes: Sequence[str] = ()


class Form(Protocol):
    """Format of a kind of completion."""

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """The body of a response that is not streamed."""

    def begin(self, index: int) -> Iterator[bytes]:
        """Events before the first piece of a choice."""

    def piece(self, index: int, choice: Choice, piece: Piece) -> Iterator[bytes]:
        """Events of a piece that ``choice`` already contains."""

    def end(self, choices: Sequence[Choice]) -> Iterator[bytes]:
        """Events after the last piece of all."""


def _usage(choices: Sequence[Choice]) -> dict[str, int]:
    prompt = sum(choice.prompt_tokens for choice in choices if choice.counts_prompt)
    made = sum(choice.tokens for choice in choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}


class _Form:
    """Common part of both kinds of completion."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._id = f"{self.prefix}-{uuid.uuid4().hex}"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": kind,
            "created": self._answer.created,
            "model": self._answer.model,
            "system_fingerprint": self._answer.fingerprint,
        }

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, int] | None = None) -> bytes:
        body = self._head(self.chunk_object) | {"choices": choices}
        if self._answer.include_usage:
            body["usage"] = usage
        return sse_event(body)

    def end(self, choices: Sequence[Choice]) -> Iterator[bytes]:
        """The count of tokens, if requested, and the end mark."""
        if self._answer.include_usage:
            yield self._chunk([], _usage(choices))
        yield _FINAL

    def _prefix_of(self, index: int) -> str:
        return self._answer.prefixes[index] if self._answer.prefixes else ""


class CompletionForm(_Form):
    """``/v1/completions``."""

    prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """See :class:`Form`."""
        return self._head(self.whole_object) | {
            "choices": [
                {
                    "index": index,
                    "text": self._prefix_of(index) + choice.text,
                    "logprobs": self._logprobs(choice.logprobs, len(self._prefix_of(index))),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": _usage(choices),
        }

    def begin(self, index: int) -> Iterator[bytes]:
        """The prompt, if echoed."""
        if prefix := self._prefix_of(index):
            yield self._part(index, prefix, None, None)

    def piece(self, index: int, choice: Choice, piece: Piece) -> Iterator[bytes]:
        """See :class:`Form`."""
        del choice
        logprobs = self._logprobs(piece.logprobs or (), len(self._prefix_of(index)))
        yield self._part(index, piece.text, logprobs, piece.finish_reason)

    def _part(
        self,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        finish_reason: FinishReason | None,
    ) -> bytes:
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._chunk([choice])

    def _logprobs(self, entries: Sequence[TokenLogprob], start: int) -> dict[str, Any] | None:
        """Probabilities of tokens; the answer starts at the character ``start`` of the text."""
        if not self._answer.with_logprobs:
            return None
        name = _names(self._answer.token_bytes)
        return {
            "tokens": [name(entry.token) for entry in entries],
            "token_logprobs": [_finite(entry.logprob) for entry in entries],
            "top_logprobs": [
                {name(token): _finite(value) for token, value in entry.top} for entry in entries
            ],
            # Not the length of the names: a character may take several tokens.
            "text_offset": [start + entry.offset for entry in entries],
        }


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)


def _names(token_bytes: TokenBytes) -> Callable[[int], str]:
    """Texts of tokens; incomplete characters are written as in OpenAI's API."""

    def name(token: int) -> str:
        content = token_bytes(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    return name


class ChatForm(_Form):
    """``/v1/chat/completions``."""

    prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """See :class:`Form`."""
        return self._head(self.whole_object) | {
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "logprobs": self._logprobs(choice.logprobs),
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": _usage(choices),
        }

    def begin(self, index: int) -> Iterator[bytes]:
        """The role of the speaker."""
        yield self._part(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, choice: Choice, piece: Piece) -> Iterator[bytes]:
        """See :class:`Form`; the finish reason has a chunk of its own."""
        del choice
        if piece.text or piece.logprobs:
            yield self._part(index, {"content": piece.text}, self._logprobs(piece.logprobs or ()))
        if piece.finish_reason is not None:
            yield self._part(index, {}, finish_reason=piece.finish_reason)

    def _part(
        self,
        index: int,
        delta: dict[str, str],
        logprobs: dict[str, Any] | None = None,
        finish_reason: FinishReason | None = None,
    ) -> bytes:
        choice = {
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return self._chunk([choice])

    def _logprobs(self, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        if not self._answer.with_logprobs:
            return None
        return {
            "content": [
                self._token(entry.token, entry.logprob)
                | {"top_logprobs": [self._token(*likely) for likely in entry.top]}
                for entry in entries
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        content = self._answer.token_bytes(token)
        return {
            "token": content.decode(errors="replace"),
            "logprob": _finite(logprob),
            "bytes": list(content),
        }
