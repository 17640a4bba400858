"""How likely given tokens are: short texts in batches, long ones in chunks through the cache."""

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
"""Of one run, padding included: more would need much memory and be no faster."""

_LOGITS_BYTES = 64 << 20
"""Of one run, at most."""


@dataclass(frozen=True)
class Targets:
    """Tokens whose probability is asked for.

    Attributes:
      inputs: what the model sees, at least one token, at most its context.
      targets: what follows each of the last ``len(targets)`` tokens of it; at least one.
      place: of the adapter in the bank.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]
    place: int


def score_targets(
    decoder: Decoder, jobs: Sequence[Targets]
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """How likely the targets of each job are.

    Jobs that see the same tokens are computed once: the choices of a question, for one.

    Returns:
      For each job natural logarithms of probabilities, ``float64 [targets]``, and whether greedy
      decoding takes the target, ``bool [targets]``.

    Raises:
      BackendError: a run fails.
    """
    alike: dict[tuple[tuple[int, ...], int], list[_Answer]] = defaultdict(list)
    answers = [_Answer(job) for job in jobs]
    for job, answer in zip(jobs, answers, strict=True):
        alike[job.inputs, job.place].append(answer)
    texts = [_Text(inputs, place, wanted) for (inputs, place), wanted in alike.items()]
    batch = decoder.new_rows()
    # No more tokens in a run than have room for their logits.
    chunk = max(1, min(PREFILL_CHUNK, _LOGITS_BYTES // (4 * decoder.vocabulary)))
    for group in _groups(texts, chunk):
        if len(group) > 1 or len(group[0].inputs) <= chunk:
            _score_group(batch, group)
        else:
            _score_long(batch, group[0], chunk)
    return [(answer.logprobs, answer.greedy) for answer in answers]


class _Answer:
    """What is to be found out for one job."""

    def __init__(self, job: Targets) -> None:
        self.targets = np.array(job.targets)
        self.first = len(job.inputs) - len(job.targets)
        """Position in the inputs of what the first target follows."""
        self.logprobs = np.zeros(len(job.targets))
        self.greedy = np.zeros(len(job.targets), np.bool_)

    def take(self, start: int, logits: NDArray[np.float32]) -> None:
        """Use the ``logits [n, V]`` of the positions from ``start``."""
        begin, end = max(self.first, start), start + len(logits)
        if begin < end:
            part = slice(begin - self.first, end - self.first)
            self.logprobs[part], self.greedy[part] = target_logprobs(
                logits[begin - start :], self.targets[part]
            )


@dataclass(frozen=True)
class _Text:
    """Tokens to run the model on, once for all that is asked of them."""

    inputs: tuple[int, ...]
    place: int
    answers: list[_Answer]

    @property
    def first(self) -> int:
        """The first position whose logits are needed."""
        return min(answer.first for answer in self.answers)


def _groups(texts: Sequence[_Text], chunk: int) -> Iterator[list[_Text]]:
    """Texts to run together: of like length, so that there is little padding; long ones alone."""
    group: list[_Text] = []
    kept = 0
    for text in sorted(texts, key=lambda one: len(one.inputs), reverse=True):
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


def _score_group(batch: Rows, group: Sequence[_Text]) -> None:
    keep = max(len(text.inputs) - text.first for text in group)
    logits = batch.process(
        [text.inputs for text in group], adapters=[text.place for text in group], keep=keep
    )
    for row, text in enumerate(group):
        own = len(text.inputs) - text.first
        for answer in text.answers:
            answer.take(text.first, logits[row, keep - own :])


def _score_long(batch: Rows, text: _Text, chunk: int) -> None:
    batch.clear(0)
    for start in range(0, len(text.inputs), chunk):
        tokens = text.inputs[start : start + chunk]
        keep = min(len(tokens), max(1, start + len(tokens) - text.first))
        logits = batch.prefill(0, tokens, adapter=text.place, keep=keep)
        for answer in text.answers:
            answer.take(start + len(tokens) - keep, logits)
