"""Requests of the API: OpenAI's fields, and a few extensions.

:mod:`fields` lists the fields that are accepted or refused without being read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    field_validator,
)

from eoracc.runtime.request import ChatOptions
from eoracc.runtime.server.api.fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    MESSAGE_FIELDS,
    PART_FIELDS,
    STREAM_FIELDS,
    UnreadFields,
)

__all__ = [
    "ChatCompletionRequest",
    "ChatMessage",
    "CompletionRequest",
    "Fields",
    "GenerationFields",
    "StreamOptions",
    "TextPart",
]

_MAX_STOP = 16
"""Most stop strings of a request."""

_MAX_LOGPROBS = 20
"""Most alternatives of a token."""

_MAX_BAD_WORDS = 1000
"""Most bad words of a request."""

_MAX_CHARACTERS = 256
"""Most characters of a stop string or a bad word, which are looked for in every answer."""

_INT64 = 2**63 - 1

_TOKEN_NAME = re.compile("0|[1-9][0-9]{0,17}")
"""A token's id as the key of a JSON object."""


def _unicode(text: str) -> str:
    """Reject half of a surrogate pair, which JSON can express."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("is not valid Unicode") from None
    return text


def _check_strings(strings: Sequence[str]) -> None:
    """Refuse strings that are empty, or longer than anyone looks for."""
    if "" in strings:
        raise ValueError("holds an empty string")
    if any(len(text) > _MAX_CHARACTERS for text in strings):
        raise ValueError(f"holds a string of more than {_MAX_CHARACTERS} characters")


def _first_wrong(limit: float) -> BeforeValidator:
    """Leave only the first member whose value is no number within ``limit``, if there is one.

    pydantic would list the mistakes of all members, a second for a large object.
    """

    def shorten(members: object) -> object:
        if isinstance(members, dict):
            for name, value in members.items():
                if type(value) not in {int, float} or not -limit <= value <= limit:
                    return {name: value}
        return members

    return BeforeValidator(shorten)


_Text = Annotated[str, AfterValidator(_unicode)]
_Token = Annotated[int, Field(ge=0, le=_INT64)]
_Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
_Factor = Annotated[float, Field(gt=0, allow_inf_nan=False)]


def _describe(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add the fields that a model does not read to its JSON schema."""
    if issubclass(model, Fields):
        properties = model.unread.properties()
        schema["properties"] = properties | schema["properties"]
        schema["additionalProperties"] = {"type": "null"}


class Fields(BaseModel):
    """An object of a request.

    Attributes:
      unread: the fields that the object may have without the model reading them.
    """

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_describe)

    unread: ClassVar[UnreadFields] = UnreadFields()

    def refuse_unread(self, path: str = "") -> None:
        """Refuse fields, here and in the objects inside, that could change the answer.

        Args:
          path: of the object in the request; empty for the request itself.

        Raises:
          ApiError: there is one; the text names it.
        """
        self.unread.check(self.model_extra or {}, known=type(self).model_fields, parent=path)
        for name, inner in self._objects():
            inner.refuse_unread(f"{path}.{name}" if path else name)

    def _objects(self) -> Iterator[tuple[str, Fields]]:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Fields):
                yield name, value
            elif isinstance(value, list) and value and isinstance(value[0], Fields):
                for index, item in enumerate(value):
                    yield f"{name}.{index}", item


class StreamOptions(Fields):
    """Options of a stream.

    Attributes:
      include_usage: end the stream with a chunk that counts tokens.
    """

    unread = STREAM_FIELDS

    include_usage: bool | None = None


class GenerationFields(Fields):
    """Fields of both kinds of completion.

    Attributes:
      model: a name listed by ``/v1/models``; None for the backbone.
      adapters: weights of adapters to sum, instead of one named by ``model``; an extension.
      top_k: number of most likely tokens to sample from; 0 or -1 for all; an extension.
      min_p: least probability relative to that of the most likely token; an extension.
      ignore_eos: continue after the token that ends the text; an extension for benchmarks.
      stop_token_ids: tokens that end the text, beside those of the model; an extension.
      include_stop_str_in_output: keep the string or token that ends the text; an extension.
      min_tokens: least number of tokens before the text may end; an extension.
      bad_words: strings that the answer does not contain; an extension.
      logit_bias: is added to the logits of tokens, by their ids.
      presence_penalty: is subtracted from the logits of tokens in the answer.
      frequency_penalty: is subtracted as often as the answer has the token.
      repetition_penalty: divides positive logits of tokens in the prompt and the answer and
        multiplies negative ones; an extension.
      repeat_penalty: llama.cpp's name of ``repetition_penalty``.
      truncate_prompt_tokens: number of the prompt's last tokens to keep; -1 for those that leave
        room for the answer; an extension.
      seed: of the first choice; further choices count up from it.
    """

    model: _Text | None = None
    adapters: Annotated[
        dict[_Text, Annotated[float, Field(allow_inf_nan=False)]] | None,
        _first_wrong(sys.float_info.max),
    ] = None
    n: Annotated[int, Field(ge=1, le=_INT64)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: _Text | list[_Text] | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT64)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[_Token], Field(fail_fast=True)] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    bad_words: Annotated[list[_Text], Field(max_length=_MAX_BAD_WORDS)] | None = None
    logit_bias: Annotated[
        dict[str, Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]] | None,
        _first_wrong(100),
    ] = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: _Factor | None = None
    repeat_penalty: _Factor | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_INT64)] | None = None
    max_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None

    @field_validator("stop", mode="after")
    @classmethod
    def _check_stop(cls, stop: str | list[str] | None) -> str | list[str] | None:
        strings = [stop] if isinstance(stop, str) else stop or []
        if len(strings) > _MAX_STOP:
            raise ValueError(f"holds more than {_MAX_STOP} strings")
        _check_strings(strings)
        return stop

    @field_validator("bad_words", mode="after")
    @classmethod
    def _check_bad_words(cls, words: list[str] | None) -> list[str] | None:
        _check_strings(words or ())
        return words

    @field_validator("truncate_prompt_tokens", mode="after")
    @classmethod
    def _check_truncation(cls, kept: int | None) -> int | None:
        if kept == 0:
            raise ValueError("must be -1, or 1 or more")
        return kept

    @field_validator("logit_bias", mode="after")
    @classmethod
    def _check_logit_bias(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for name in biases or ():
            if not _TOKEN_NAME.fullmatch(name):
                raise ValueError(f"has {ascii(name)[:32]} where the id of a token belongs")
        return biases

    @cached_property
    def token_biases(self) -> dict[int, float]:
        """``logit_bias`` by ids."""
        return {int(name): bias for name, bias in (self.logit_bias or {}).items()}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a count of its tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


_TOKENS_SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": _INT64},
    "minItems": 1,
}
_PROMPT_SCHEMA = {
    "title": "Prompt",
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _TOKENS_SCHEMA,
        {"type": "array", "items": _TOKENS_SCHEMA, "minItems": 1},
    ],
}


class CompletionRequest(GenerationFields):
    """``POST /v1/completions``.

    Attributes:
      prompt: one or several, each as text or as token ids.
      echo: start the answer with the prompt.
      logprobs: number of alternatives to report for each token.
    """

    unread = COMPLETION_FIELDS

    prompt: Annotated[
        _Text | list[_Text] | list[int] | list[list[int]], WithJsonSchema(_PROMPT_SCHEMA)
    ]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None

    @field_validator("prompt", mode="plain")
    @classmethod
    def _check_prompt(cls, prompt: object) -> object:
        if isinstance(prompt, str):
            return _unicode(prompt)
        if isinstance(prompt, list) and prompt:
            if all(isinstance(item, str) for item in prompt):
                return [_unicode(item) for item in prompt]
            if _are_tokens(prompt):
                return prompt
            if all(isinstance(item, list) and item and _are_tokens(item) for item in prompt):
                return prompt
        raise ValueError("must be a string, a list of strings, of token ids, or of lists of those")

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """``prompt`` as a list."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


def _are_tokens(items: Sequence[object]) -> bool:
    return all(type(item) is int and 0 <= item <= _INT64 for item in items)


class TextPart(Fields):
    """Part of a message."""

    unread = PART_FIELDS

    type: Literal["text"]
    text: _Text


def _form_of_content(content: object) -> str:
    return "in parts" if isinstance(content, list) else "as text"


class ChatMessage(Fields):
    """A turn of a chat.

    Attributes:
      role: of the speaker; a developer is the system.
      content: what is said; parts are joined by line ends.
      name: of the speaker, for chat templates that use it.
      reasoning_content: thoughts before an answer, for chat templates that use them.
    """

    unread = MESSAGE_FIELDS

    role: Literal["system", "developer", "user", "assistant"]
    # A tag that is no identifier stays out of the path that an error names.
    content: Annotated[
        Annotated[_Text, Tag("as text")]
        | Annotated[list[TextPart], Field(fail_fast=True), Tag("in parts")],
        Discriminator(_form_of_content),
    ]
    name: _Text | None = None
    reasoning_content: _Text | None = None

    def as_dict(self) -> dict[str, str]:
        """The turn in the form of chat templates."""
        content = self.content
        if not isinstance(content, str):
            content = "\n".join(part.text for part in content)
        turn = {"role": "system" if self.role == "developer" else self.role, "content": content}
        for name in ("name", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                turn[name] = value
        return turn


class ChatCompletionRequest(GenerationFields):
    """``POST /v1/chat/completions``.

    Attributes:
      logprobs: report the probability of each token.
      top_logprobs: number of alternatives to report for each token.
      max_completion_tokens: newer name of ``max_tokens``.
      add_generation_prompt: begin the assistant's answer, which is the default.
      continue_final_message: the answer continues the last message.
      chat_template_kwargs: variables of the chat template, such as ``enable_thinking``.
      documents: for chat templates that show them.
    """

    unread = CHAT_FIELDS

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=_MAX_LOGPROBS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=0, le=_INT64)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[_Text, Any] | None = None
    documents: Annotated[list[dict[_Text, Any]], Field(fail_fast=True)] | None = None

    def chat_options(self) -> ChatOptions:
        """How the messages become text.

        Raises:
          RequestError: the fields contradict each other.
        """
        return ChatOptions(
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=bool(self.continue_final_message),
            documents=self.documents,
            template_kwargs=self.chat_template_kwargs or {},
        )
