"""Rules for logits, against the processors of transformers and a plain count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from eoracc.errors import RequestError
from eoracc.runtime.decode.logit_rules import LogitRules
from eoracc.runtime.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

VOCABULARY = 40
PROMPT = [3, 3, 7, 11]
ANSWER = [7, 9, 9, 20, 9, 21, 22]
ENDS = [1, 2]
BAD_WORDS = [[5], [9, 13], [9, 20, 14], [20, 9, 15], [9, 9, 16], [21, 22, 17, 18], [22, 18]]
# One rounding of the result to float32, of values below 2^5.
BOUND = 2.0**-24 * 2**5


def logits(step: int) -> NDArray[np.float32]:
    return np.random.default_rng(step).normal(0, 3, VOCABULARY).astype(np.float32)


def ours(bad_words: Sequence[Sequence[int]] = (), **options: Any) -> list[NDArray[np.float32]]:  # noqa: ANN401
    """The logits of every step of the answer."""
    request = Request(prompt=PROMPT, **options)
    rules = LogitRules(request, prompt=PROMPT, ends=ENDS, bad_words=bad_words)
    return [rules.apply(logits(step), ANSWER[:step]) for step in range(len(ANSWER) + 1)]


def theirs(processor: object, *, with_prompt: bool = True) -> list[NDArray[np.float32]]:
    """The same by a processor of transformers."""
    import torch

    assert callable(processor)
    return [
        processor(
            torch.tensor([(PROMPT if with_prompt else []) + ANSWER[:step]], dtype=torch.long),
            torch.from_numpy(logits(step))[None],
        )[0].numpy()
        for step in range(0 if with_prompt else 1, len(ANSWER) + 1)
    ]


def assert_same(
    found: Sequence[NDArray[np.float32]], expected: Sequence[NDArray[np.float32]]
) -> None:
    for ours_of_a_step, theirs_of_a_step in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours_of_a_step, theirs_of_a_step, rtol=0, atol=BOUND)
    assert any((step != logits(index)).any() for index, step in enumerate(expected))


@pytest.mark.parametrize("penalty", [0.5, 1.3, 7.0])
def test_repetition_penalty(penalty: float) -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    assert_same(ours(repetition_penalty=penalty), theirs(RepetitionPenaltyLogitsProcessor(penalty)))


def test_logit_bias() -> None:
    from transformers import SequenceBiasLogitsProcessor

    biases = {3: -100.0, 9: 2.5, 39: -1.25}
    processor = SequenceBiasLogitsProcessor([[[token], bias] for token, bias in biases.items()])
    assert_same(ours(logit_bias=biases), theirs(processor))


@pytest.mark.parametrize("least", [1, 4, 8])
def test_min_new_tokens(least: int) -> None:
    from transformers import MinNewTokensLengthLogitsProcessor

    processor = MinNewTokensLengthLogitsProcessor(len(PROMPT), least, ENDS, device="cpu")
    assert_same(ours(min_new_tokens=least), theirs(processor))


def test_bad_words() -> None:
    from transformers import NoBadWordsLogitsProcessor

    processor = NoBadWordsLogitsProcessor(BAD_WORDS, eos_token_id=None)
    found = ours(BAD_WORDS)
    assert_same(found[1:], theirs(processor, with_prompt=False))
    # Only the answer counts, where transformers sees the prompt as well.
    assert np.flatnonzero(np.isneginf(found[0])).tolist() == [5]
    assert np.flatnonzero(np.isneginf(found[3])).tolist() == [5, 13, 16]
    assert np.flatnonzero(np.isneginf(found[7])).tolist() == [5, 18]


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, -0.7), (-2.0, 2.0)])
def test_presence_and_frequency(presence: float, frequency: float) -> None:
    found = ours(presence_penalty=presence, frequency_penalty=frequency)
    for step, values in enumerate(found):
        for token in range(VOCABULARY):
            count = ANSWER[:step].count(token)
            expected = logits(step)[token] - count * frequency - (presence if count else 0)
            assert abs(values[token] - expected) < BOUND


def test_all_in_the_order_of_transformers() -> None:
    from transformers import (
        LogitsProcessorList,
        NoBadWordsLogitsProcessor,
        RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor,
    )

    processors = LogitsProcessorList(
        [
            SequenceBiasLogitsProcessor([[[9], -4.0], [[7], 4.0]]),
            RepetitionPenaltyLogitsProcessor(1.7),
            NoBadWordsLogitsProcessor(BAD_WORDS, eos_token_id=None),
        ]
    )
    found = ours(BAD_WORDS, logit_bias={9: -4.0, 7: 4.0}, repetition_penalty=1.7)
    assert_same(found, theirs(processors))


def test_without_rules_the_logits_are_the_same_array() -> None:
    rules = LogitRules(Request(prompt=PROMPT), prompt=PROMPT, ends=ENDS, bad_words=())
    given = logits(0)
    assert rules.apply(given, ANSWER) is given
    rules = LogitRules(
        Request(prompt=PROMPT, repetition_penalty=2.0), prompt=PROMPT, ends=ENDS, bad_words=()
    )
    before = given.copy()
    assert rules.apply(given, ANSWER) is not given
    np.testing.assert_array_equal(given, before)


def test_huge_values_stay_finite_and_infinite_logits_stay_infinite() -> None:
    rules = LogitRules(
        Request(
            prompt=PROMPT,
            repetition_penalty=1e300,
            presence_penalty=-1e300,
            logit_bias={30: 1e300, 31: -1e300},
        ),
        prompt=range(VOCABULARY),
        ends=ENDS,
        bad_words=(),
    )
    given = logits(0)
    given[[12, 13, 14]] = np.inf, -np.inf, np.nan
    changed = rules.apply(given, ANSWER)
    assert np.flatnonzero(~np.isfinite(changed)).tolist() == [12, 13, 14]
    assert np.isposinf(changed[12])
    assert changed[31] == -np.finfo(np.float32).max


def test_all_tokens_banned() -> None:
    words = [[token] for token in range(3, VOCABULARY)]
    rules = LogitRules(
        Request(prompt=PROMPT, min_new_tokens=1), prompt=PROMPT, ends=[0, *ENDS], bad_words=words
    )
    with pytest.raises(RequestError, match="every token is banned"):
        rules.apply(logits(0), [])
    assert np.isfinite(rules.apply(logits(0), [4])).sum() == 3
