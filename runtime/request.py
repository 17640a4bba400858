"""Requests to a model and its results, as plain data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypedDict

from eoracc.errors import RequestError
from eoracc.runtime.request_ranges import check_ranges, check_weight

__all__ = [
    "NO_ADAPTER",
    "AdapterChoice",
    "ChatOptions",
    "Completion",
    "ContinuationScore",
    "FinishReason",
    "Message",
    "Piece",
    "Prompt",
    "Request",
    "RequestOptions",
    "Score",
    "TokenLogprob",
    "adapter_weights",
]

NO_ADAPTER = "none"
"""Reserved adapter name: the backbone alone."""

Message: TypeAlias = Mapping[str, Any]
"""One turn of a chat: ``{"role": "user", "content": "…"}``, and fields that the template reads."""

Prompt: TypeAlias = str | Sequence[int] | Sequence[Message]
"""Text to continue, its tokens, or the messages of a chat."""

AdapterChoice: TypeAlias = str | Mapping[str, float] | None
"""An adapter's name, several with their weights, or none."""

FinishReason: TypeAlias = Literal["stop", "length", "cancelled"]
"""Why a text ended: an end token or stop string, the limit on tokens, or cancellation."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """How the messages of a chat become its text.

    Attributes:
      template: name of the chat template; None for ``tool_use`` if there are tools and such a
        template, else for ``default``.
      add_generation_prompt: whether the beginning of the assistant's answer follows the messages;
        None for yes, unless the last message is continued.
      continue_final_message: leave the last message open, so that the answer continues it; a name
        continues this field of it instead of ``content``.
      tools: descriptions of functions, as JSON schemas.
      documents: with ``title`` and ``text`` each.
      template_kwargs: further variables of the template, such as ``enable_thinking``.
    """

    template: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str = False
    tools: Sequence[Mapping[str, Any]] | None = None
    documents: Sequence[Mapping[str, Any]] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
          RequestError: an answer can not both begin and continue.
        """
        if self.add_generation_prompt and self.continue_final_message:
            raise RequestError(
                "continue_final_message: excludes add_generation_prompt: leave one out"
            )

    @property
    def begins_answer(self) -> bool:
        """Whether the beginning of the assistant's answer follows the messages."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


class RequestOptions(TypedDict, total=False):
    """Options of a :class:`Request`, which describes them, as keywords."""

    chat: bool
    chat_options: ChatOptions | None
    adapter: AdapterChoice
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop: bool
    min_new_tokens: int
    logit_bias: Mapping[int, float]
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    bad_words: Sequence[str]
    logprobs: int | None
    ignore_end: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """A text to continue, with the options of generation.

    Attributes:
      prompt: text, tokens, or messages; messages go through the chat template.
      chat: treat a text as the user's turn of a chat.
      chat_options: how messages become text; None for the defaults.
      adapter: its name, or a weight for each of several, or None for the backbone alone.
      max_new_tokens: most tokens to generate; the model's context is a limit too.
      temperature: 0 chooses the most likely token every time, among equals the lowest id.
      top_k: draw from that many most likely tokens; 0 for all.
      top_p: of those, draw from the most likely ones that make up this share of probability, in
        (0, 1].
      min_p: of those, draw from tokens with at least this share of the highest probability, in
        [0, 1].
      seed: makes sampling repeatable, independent of other requests.
      stop: strings that end the text; they are not part of it.
      stop_token_ids: tokens that end the text, beside those of the model.
      include_stop: the string or token that ends the text is part of it.
      min_new_tokens: before that many tokens, neither an end token nor a stop string ends the text.
      logit_bias: is added to the logits of tokens, by their ids.
      repetition_penalty: above 0; of every token in the prompt or the answer, a logit above 0 is
        divided by it, and one below 0 multiplied.
      presence_penalty: is subtracted from the logit of every token in the answer.
      frequency_penalty: is subtracted as often as the answer has the token.
      bad_words: strings that the answer does not contain. Their tokens count, with and without a
        blank before: a string that is put together from other tokens is not seen.
      logprobs: number of most likely tokens to list beside each token; None for no probabilities.
      ignore_end: continue after the token that ends the text, as benchmarks need.
    """

    prompt: Prompt
    chat: bool = False
    chat_options: ChatOptions | None = None
    adapter: AdapterChoice = None
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop: bool = False
    min_new_tokens: int = 0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bad_words: Sequence[str] = ()
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
          RequestError: a value is out of range.
        """
        check_ranges(self)
        if "" in self.stop:
            raise RequestError("stop: a stop string may not be empty: leave it out")
        if "" in self.bad_words:
            raise RequestError("bad_words: a string may not be empty: leave it out")
        adapter_weights(self.adapter)


def adapter_weights(adapter: AdapterChoice) -> tuple[tuple[str, float], ...]:
    """Names of adapters with their weights, sorted, without weights of 0.

    Raises:
      RequestError: a weight is too large or no number.

    >>> adapter_weights("math")
    (('math', 1.0),)
    >>> adapter_weights({"prose": 0.5, "math": 0.5, "code": 0})
    (('math', 0.5), ('prose', 0.5))
    """
    if adapter is None or adapter == NO_ADAPTER:
        return ()
    if isinstance(adapter, str):
        return ((adapter, 1.0),)
    if not isinstance(adapter, Mapping):
        raise RequestError("adapter: must be a name, or weights by name")
    for name, weight in adapter.items():
        check_weight(name, weight)
    return tuple(sorted((name, float(weight)) for name, weight in adapter.items() if weight))


@dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token under the model, before temperature and filters.

    Attributes:
      token: its id.
      logprob: natural logarithm of its probability.
      top: the most likely tokens with their logarithms, most likely first, as many as requested.
      offset: characters of the text that were complete before the token.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    offset: int = 0


@dataclass(frozen=True)
class Piece:
    """Part of a text that is being generated; the texts of all pieces add up to the whole.

    Attributes:
      text: whole characters; may be empty in the last piece.
      tokens: generated since the piece before.
      logprobs: one for each token; None unless requested.
      finish_reason: of the text in its last piece; None in every other.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Completion:
    """A finished text.

    Attributes:
      text: the generated text, without the stop string unless it was requested, and without a
        character whose last bytes are missing.
      tokens: chosen by the model, without the token that ended the text unless it was requested,
        with those of a stop string.
      finish_reason: why the text ended.
      prompt_tokens: length of the prompt.
      logprobs: one for each token; None unless requested.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True)
class Score:
    """Log-probabilities of a text's tokens.

    Attributes:
      tokens: of the text, with BOS if the tokenizer adds it.
      logprobs: natural logarithms, one for each token but the first, which has no context.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        """``exp`` of the mean negative logarithm; nan for a single token."""
        if not self.logprobs:
            return math.nan
        return math.exp(-math.fsum(self.logprobs) / len(self.logprobs))


@dataclass(frozen=True)
class ContinuationScore:
    """Log-probabilities of a continuation after its context.

    Attributes:
      tokens: of the continuation.
      logprobs: natural logarithms, one for each token.
      greedy: whether each token is the most likely one, so that greedy decoding chooses it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    greedy: bool = field(default=False)

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return math.fsum(self.logprobs)
