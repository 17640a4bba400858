"""Changes to the logits of one request before a token is chosen.

In this order: biases, penalties, bans. The probabilities that a request asks for are those of the
model, before any of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from eoracc.runtime.request import Request

__all__ = ["LogitRules"]

_LARGEST = float(np.finfo(np.float32).max)


class LogitRules:
    """The rules of one request."""

    def __init__(
        self,
        request: Request,
        *,
        prompt: Iterable[int],
        ends: Iterable[int],
        bad_words: Iterable[Sequence[int]],
    ) -> None:
        """Prepare the rules of ``request``.

        Args:
          request: its options.
          prompt: tokens that a penalty on repetition counts.
          ends: tokens that are banned from the first ``request.min_new_tokens`` tokens.
          bad_words: sequences of at least one token whose last token is banned after the others.
        """
        # As arrays: a request may name very many tokens, and this is applied for each token.
        biases = {token: bias for token, bias in request.logit_bias.items() if bias}
        self._biased = np.fromiter(biases, np.int64)
        self._biases = np.fromiter(biases.values(), np.float64)
        self._repetition = request.repetition_penalty
        self._presence = request.presence_penalty
        self._frequency = request.frequency_penalty
        self._penalizes = self._repetition != 1 or self._presence != 0 or self._frequency != 0
        self._in_prompt = frozenset(prompt) if self._repetition != 1 else frozenset()
        self._prompt = np.fromiter(self._in_prompt, np.int64)
        self._min_new_tokens = request.min_new_tokens
        self._ends = np.fromiter(ends, np.int64)
        words = [tuple(word) for word in bad_words]
        self._bad_tokens = np.array([last for *before, last in words if not before], np.int64)
        # By the token before the one that they ban.
        self._bad_sequences: dict[int, list[tuple[int, ...]]] = {}
        for word in words:
            if len(word) > 1:
                self._bad_sequences.setdefault(word[-2], []).append(word)

    def apply(self, logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits to choose the next token by.

        Args:
          logits: of the model, ``float32 [V]``; they are not changed.
          tokens: of the answer so far.

        Returns:
          ``float32 [V]``, which is ``logits`` itself where no rule applies.

        Raises:
          RequestError: every token is banned.
        """
        banned = self._banned(tokens)
        if not (len(self._biased) or self._penalizes or len(banned)):
            return logits
        changed = logits.copy()
        _shift(changed, self._biased, self._biases)
        if self._penalizes:
            self._penalize(changed, tokens)
        if len(banned):
            changed[banned] = -np.inf
            if changed.max() == -np.inf < logits.max():
                raise RequestError("every token is banned: name fewer bad_words or stop_token_ids")
        return changed

    def _banned(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        banned = [self._bad_tokens]
        if len(tokens) < self._min_new_tokens:
            banned.append(self._ends)
        if tokens:
            followers = [
                word[-1]
                for word in self._bad_sequences.get(tokens[-1], ())
                if tuple(tokens[1 - len(word) :]) == word[:-1]
            ]
            banned.append(np.array(followers, np.int64))
        return np.concatenate(banned)

    def _penalize(self, logits: NDArray[np.float32], tokens: Sequence[int]) -> None:
        made, counts = np.unique(np.array(tokens, np.int64), return_counts=True)
        if self._repetition != 1:
            new = [token for token in made.tolist() if token not in self._in_prompt]
            context = np.concatenate([self._prompt, np.array(new, np.int64)])
            values = logits[context].astype(np.float64)
            with np.errstate(over="ignore"):  # a huge penalty ends at the largest float32
                values = np.where(values < 0, values * self._repetition, values / self._repetition)
            _put(logits, context, values)
        _shift(logits, made, -self._presence - self._frequency * counts.astype(np.float64))


def _shift(
    logits: NDArray[np.float32], ids: NDArray[np.int64], differences: NDArray[np.float64]
) -> None:
    """Add ``differences`` to the logits of ``ids``."""
    if len(ids):
        _put(logits, ids, logits[ids].astype(np.float64) + differences)


def _put(logits: NDArray[np.float32], ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Store ``values`` at ``ids``, in the range of float32 where the logit is finite."""
    finite = np.isfinite(logits[ids])
    logits[ids] = np.where(finite, np.clip(values, -_LARGEST, _LARGEST), logits[ids])
