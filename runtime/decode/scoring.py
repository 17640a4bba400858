"""Log-probabilities of given tokens: short texts in batches, long ones in chunks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from eoracc.runtime.decode.sampling import target_logprobs
from eoracc.runtime.decode.scheduler import PREFILL_CHUNK

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from eoracc.runtime.decode.decoder import Decoder, Rows

__all__ = ["Targets", "score_targets"]

_RUN_TOKENS = 512
"""Tokens of one run, with padding: more would need much memory and be no faster."""

_LOGITS_BYTES = 64 << 20
"""Most bytes of the logits of one run."""


@dataclass(frozen=True)
class Targets:
    """Tokens to score after a context.

    Attributes:
      inputs: of the model; at least one token, at most its context.
      targets: the token after each of the last ``len(targets)`` inputs; at least one.
      place: of the adapter in the bank.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    place: int


def score_targets(
    decoder: Decoder, queries: Sequence[Targets]
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Score the targets of each query.

    Queries with equal inputs are computed once, for example the choices of a question.

    Returns:
      For each query natural logarithms of probabilities, ``float64 [targets]``, and whether greedy
      decoding chooses the target, ``bool [targets]``.

    Raises:
      BackendError: a run fails.
    """
    alike: dict[tuple[tuple[int, ...], int], list[_Answer]] = defaultdict(list)
    answers = [_Answer(query) for query in queries]
    for query, answer in zip(queries, answers, strict=True):
        alike[query.inputs, query.place].append(answer)
    texts = [_Text(inputs, place, own) for (inputs, place), own in alike.items()]
    rows = decoder.new_rows()
    # The logits of a run must fit the limit.
    chunk = max(1, min(PREFILL_CHUNK, _LOGITS_BYTES // (4 * decoder.vocabulary)))
    for group in _groups(texts, chunk):
        if len(group) > 1 or len(group[0].inputs) <= chunk:
            _score_group(rows, group)
        else:
            _score_long(rows, group[0], chunk)
    return [(answer.logprobs, answer.greedy) for answer in answers]


class _Answer:
    """The scores of one query."""

    def __init__(self, query: Targets) -> None:
        self.targets = np.array(query.targets)
        self.first = len(query.inputs) - len(query.targets)
        """Position of the input before the first target."""
        self.logprobs = np.zeros(len(query.targets))
        self.greedy = np.zeros(len(query.targets), np.bool_)

    def take(self, start: int, logits: NDArray[np.float32]) -> None:
        """Score targets with the ``logits [n, V]`` of the positions from ``start``."""
        begin, end = max(self.first, start), start + len(logits)
        if begin < end:
            part = slice(begin - self.first, end - self.first)
            self.logprobs[part], self.greedy[part] = target_logprobs(
                logits[begin - start :], self.targets[part]
            )


@dataclass(frozen=True)
class _Text:
    """Inputs of the model, shared by all queries that have them."""

    inputs: tuple[int, ...]
    place: int
    answers: list[_Answer]

    @property
    def first(self) -> int:
        """First position whose logits are needed."""
        return min(answer.first for answer in self.answers)


def _groups(texts: Sequence[_Text], chunk: int) -> Iterator[list[_Text]]:
    """Group texts of similar length, for little padding; long ones are alone."""
    group: list[_Text] = []
    kept = 0
    for text in sorted(texts, key=lambda text: len(text.inputs), reverse=True):
        kept = max(kept, len(text.inputs) - text.first)
        # The first of a group is its longest.
        longest = len(group[0].inputs) if group else len(text.inputs)
        count = len(group) + 1
        if group and (longest * count > _RUN_TOKENS or kept * count > chunk):
            yield group
            group, kept = [], len(text.inputs) - text.first
        group.append(text)
    if group:
        yield group


def _score_group(rows: Rows, group: Sequence[_Text]) -> None:
    keep = max(len(text.inputs) - text.first for text in group)
    logits = rows.process(
        [text.inputs for text in group], adapters=[text.place for text in group], keep=keep
    )
    for row, text in enumerate(group):
        own = len(text.inputs) - text.first
        for answer in text.answers:
            answer.take(text.first, logits[row, keep - own :])


def _score_long(rows: Rows, text: _Text, chunk: int) -> None:
    rows.clear(0)
    for start in range(0, len(text.inputs), chunk):
        tokens = text.inputs[start : start + chunk]
        keep = min(len(tokens), max(1, start + len(tokens) - text.first))
        logits = rows.prefill(
            0, tokens, adapter=text.place, keep=keep, text_length=len(text.inputs)
        )
        for answer in text.answers:
            answer.take(start + len(tokens) - keep, logits)
