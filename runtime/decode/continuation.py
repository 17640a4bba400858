"""The state of one request while it is served: from logits to tokens to text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from eoracc.runtime.decode.logit_rules import LogitRules
from eoracc.runtime.decode.sampling import LogitsError, choose, token_logprob
from eoracc.runtime.decode.text import StopStrings
from eoracc.runtime.request import Completion, FinishReason, Piece, Request, TokenLogprob

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from eoracc.runtime.decode.text import Tokenizer

__all__ = ["Continuation", "Listener", "complete"]

Listener: TypeAlias = Callable[[Piece | Exception], None]
"""Called with each piece of a text; the last one has a finish reason, or is an error."""


class Continuation:
    """A request that is being served.

    Attributes:
      request: prompt and options.
      prompt: tokens of the prompt.
      place: of the adapter in the bank.
      tokens: generated so far.
      finish_reason: None until the text has ended.
      cancelled: whether to stop; any thread may set it.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        *,
        prompt: list[int],
        limit: int,
        bad_words: Iterable[Sequence[int]] = (),
        place: int,
        listener: Listener,
    ) -> None:
        """Begin the text.

        Args:
          request: its options.
          tokenizer: for its text and its end.
          prompt: at least one token.
          limit: number of tokens to generate; 0 ends the text at once.
          bad_words: tokens of ``request.bad_words``.
          place: of the adapter in the bank.
          listener: of its pieces.
        """
        self.request = request
        self.prompt = prompt
        self.place = place
        self.listener = listener
        self.tokens: list[int] = []
        self.finish_reason: FinishReason | None = None if limit else "length"
        self.cancelled = False
        self._limit = limit
        self._ends = frozenset(request.stop_token_ids)
        if not request.ignore_end:
            self._ends |= tokenizer.ends
        self._rules = LogitRules(
            request,
            prompt=prompt,
            # An end that is ignored is no part of the text either.
            ends=self._ends | tokenizer.ends,
            bad_words=bad_words,
        )
        self._rng: np.random.Generator | None = None
        self._stream = tokenizer.stream(prompt)
        self._stops = StopStrings(request.stop, include=request.include_stop)
        self._decoded = 0  # characters
        self._pending: list[int] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def text(self) -> list[int]:
        """The prompt and what has been generated."""
        return [*self.prompt, *self.tokens]

    def push(self, logits: NDArray[np.float32]) -> Piece | None:
        """Choose the next token.

        Args:
          logits: ``float32 [V]``.

        Returns:
          A piece with new text, or the last piece; None while no text is certain.

        Raises:
          BackendError: the logits are not finite.
          RequestError: the request bans every token, or the adapter makes logits not finite.
        """
        request = self.request
        allowed = self._rules.apply(logits, self.tokens)
        try:
            token = choose(
                allowed,
                self._draw,
                temperature=request.temperature,
                top_k=request.top_k,
                top_p=request.top_p,
                min_p=request.min_p,
            )
        except LogitsError as error:
            raise error.of(request.adapter) from None
        ends = token in self._ends
        if ends and not request.include_stop:
            return self.end("stop")
        self.tokens.append(token)
        self._pending.append(token)
        if request.logprobs is not None:
            self._logprobs.append(
                token_logprob(logits, token, request.logprobs, offset=self._decoded)
            )
        text = self._stream.decode(token)
        self._decoded += len(text)
        text = self._stops.push(text, search=len(self.tokens) > request.min_new_tokens)
        if ends or self._stops.found:
            return self.end("stop", text)
        if len(self.tokens) == self._limit:
            return self.end("length", text)
        return self._piece(text) if text else None

    def end(self, finish_reason: FinishReason, text: str = "") -> Piece:
        """End the text; returns its last piece."""
        if not self._stops.found:
            text += self._stops.push(self._stream.flush())
        self.finish_reason = "stop" if self._stops.found else finish_reason
        return self._piece(text + self._stops.flush())

    def _draw(self) -> float:
        # Made on first use: a greedy request draws nothing, and numpy.random takes 6 MB.
        if self._rng is None:
            self._rng = np.random.default_rng(self.request.seed)
        return self._rng.random()

    def _piece(self, text: str) -> Piece:
        tokens, self._pending = tuple(self._pending), []
        logprobs, self._logprobs = tuple(self._logprobs), []
        wanted = self.request.logprobs is not None
        return Piece(text, tokens, logprobs if wanted else None, self.finish_reason)


def complete(pieces: Iterable[Piece], prompt_tokens: int) -> Completion:
    """Join all pieces of a text.

    Raises:
      ValueError: the last piece is missing.
    """
    whole = list(pieces)
    logprobs = [piece.logprobs for piece in whole if piece.logprobs is not None]
    reason = whole[-1].finish_reason
    if reason is None:
        raise ValueError("the last piece is missing")
    return Completion(
        text="".join(piece.text for piece in whole),
        tokens=tuple(token for piece in whole for token in piece.tokens),
        finish_reason=reason,
        prompt_tokens=prompt_tokens,
        logprobs=tuple(logprob for part in logprobs for logprob in part) if logprobs else None,
    )
