"""Changes to the logits of one request before a token is chosen.

In this order: biases, penalties, bans. The probabilities that a request asks for are those of the
model, before any of them.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from eoracc.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from numpy.typing import NDArray

    from eoracc.runtime.request import Request

__all__ = ["LogitRules"]

_LARGEST = float(np.finfo(np.float32).max)


class LogitRules:
    """The rules of one request, with the tokens that they count."""

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
        self._bias = {token: float(bias) for token, bias in request.logit_bias.items() if bias}
        self._repetition = request.repetition_penalty
        self._presence = request.presence_penalty
        self._frequency = request.frequency_penalty
        self._penalizes = self._repetition != 1 or self._presence != 0 or self._frequency != 0
        self._min_new_tokens = request.min_new_tokens
        self._ends = frozenset(ends)
        self._prompt = frozenset(prompt) if self._repetition != 1 else frozenset()
        self._made: Counter[int] = Counter()
        self._counted = 0
        self._bad_tokens: set[int] = set()
        # By the token that comes before the banned one.
        self._bad_sequences: dict[int, list[tuple[int, ...]]] = {}
        for sequence in bad_words:
            *before, last = sequence
            if before:
                self._bad_sequences.setdefault(before[-1], []).append(tuple(sequence))
            else:
                self._bad_tokens.add(last)

    def apply(self, logits: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits to choose the next token by.

        Args:
          logits: of the model, ``float32 [V]``; they are not changed.
          tokens: of the answer so far; those of the call before, and more.

        Returns:
          ``float32 [V]``, which is ``logits`` itself where no rule applies.

        Raises:
          RequestError: every token is banned.
        """
        banned = self._banned(tokens)
        if not (self._bias or self._penalizes or banned):
            return logits
        changed = logits.copy()
        if self._bias:
            ids = np.fromiter(self._bias, np.int64)
            biases = np.fromiter(self._bias.values(), np.float64)
            _put(changed, ids, changed[ids].astype(np.float64) + biases)
        if self._penalizes:
            self._penalize(changed, tokens)
        if banned:
            changed[list(banned)] = -np.inf
            if changed.max() == -np.inf < logits.max():
                raise RequestError("every token is banned: name fewer bad_words or stop_token_ids")
        return changed

    def _banned(self, tokens: Sequence[int]) -> Collection[int]:
        banned = set(self._bad_tokens)
        if len(tokens) < self._min_new_tokens:
            banned |= self._ends
        if tokens:
            for sequence in self._bad_sequences.get(tokens[-1], ()):
                length = len(sequence) - 1
                if tuple(tokens[-length:]) == sequence[:-1]:
                    banned.add(sequence[-1])
        return banned

    @np.errstate(over="ignore")  # a huge penalty ends at the largest float32
    def _penalize(self, logits: NDArray[np.float32], tokens: Sequence[int]) -> None:
        self._made.update(tokens[self._counted :])
        self._counted = len(tokens)
        if self._repetition != 1:
            ids = np.fromiter(self._prompt | self._made.keys(), np.int64)
            values = logits[ids].astype(np.float64)
            _put(
                logits,
                ids,
                np.where(values < 0, values * self._repetition, values / self._repetition),
            )
        if self._made:
            ids = np.fromiter(self._made, np.int64)
            counts = np.fromiter(self._made.values(), np.float64)
            penalties = self._presence + self._frequency * counts
            _put(logits, ids, logits[ids].astype(np.float64) - penalties)


def _put(logits: NDArray[np.float32], ids: NDArray[np.int64], values: NDArray[np.float64]) -> None:
    """Store ``values`` at ``ids``, in the range of float32 where the logit is finite."""
    finite = np.isfinite(logits[ids])
    logits[ids] = np.where(finite, np.clip(values, -_LARGEST, _LARGEST), logits[ids])
