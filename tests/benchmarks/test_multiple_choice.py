from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.eager_choices import open_eager
from benchmarks.multiple_choice import ORIGINAL, Scorer, System, correct, rows, score_all
from benchmarks.question_sets import Question, encode_choices
from tests.tiny_artifact import write_byte_tokenizer
from tests.tiny_models import tiny_model

QUESTIONS = [
    Question("What?", ("a", "bb"), 1),
    Question("What?", ("aaaa", "b"), 0),
    Question("What?", ("a", "b"), 0),
]
SCORES = [[-1.0, -1.5], [-2.0, -1.0], [-1.0, -1.0]]


def test_a_rule_says_what_the_best_choice_is() -> None:
    assert correct(QUESTIONS, SCORES, "plain").tolist() == [False, False, True]
    # -1.5 / 2 > -1.0 / 1, and -2.0 / 4 > -1.0 / 1; the first among equals wins.
    assert correct(QUESTIONS, SCORES, "normalized").tolist() == [True, True, True]


def test_rows_compare_with_the_original() -> None:
    original, worse = SCORES, [*SCORES[:2], [-2.0, -1.0]]
    found = rows(
        {"set": QUESTIONS},
        {"worse": {"set": worse}, ORIGINAL: {"set": original}, "same": {"set": original}},
    )
    by_name = {(row.system, row.rule): row for row in found}
    assert len(found) == len(by_name) == 6
    assert by_name[ORIGINAL, "plain"].against_original is None
    assert by_name[ORIGINAL, "normalized"].accuracy == 1
    row = by_name["worse", "plain"]
    assert (row.accuracy, row.count, row.questions) == (0, 3, "set")
    assert row.against_original is not None
    assert (row.against_original.gained, row.against_original.lost) == (0, 1)
    assert by_name["same", "plain"].against_original is not None
    assert rows({"set": QUESTIONS}, {"only": {"set": worse}})[0].against_original is None


def test_what_has_been_scored_is_not_scored_again(tmp_path: Path) -> None:
    asked: list[Question] = []

    def opened() -> Scorer:
        def score(questions: Sequence[Question]) -> list[list[float]]:
            asked.extend(questions)
            return [[-float(len(choice)) for choice in one.choices] for one in questions]

        return score

    one, other = System("one", "1", opened), System("other", "2", opened)
    sets = {"first": QUESTIONS[:1], "second": QUESTIONS[1:2]}
    found = score_all([one], sets, tmp_path)
    assert found == {"one": {"first": [[-1, -2]], "second": [[-4, -1]]}}
    assert asked == QUESTIONS[:2]
    more = score_all([one, other], {**sets, "third": QUESTIONS[2:]}, tmp_path)
    assert asked == [*QUESTIONS[:2], QUESTIONS[2], *QUESTIONS]
    assert more["one"] == more["other"] == {**found["one"], "third": [[-1, -1]]}
    assert not list(tmp_path.glob("*.partial"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return write_byte_tokenizer(tiny_model("smollm", folder, vocab_size=260))


@pytest.mark.parametrize(
    "question",
    [
        Question("Why", ("so", "because", "so what"), 0),
        Question("?", ("x", "y"), 0),  # nothing but one token is shared
    ],
)
def test_choices_from_one_cache_score_as_whole_texts(checkpoint: Path, question: Question) -> None:
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    factory: Any = AutoModelForCausalLM
    model = factory.from_pretrained(checkpoint, dtype=torch.float32).eval()
    expected, terms = [], 0
    for one in encode_choices(Tokenizer.from_file(str(checkpoint / "tokenizer.json")), question):
        with torch.inference_mode():
            logits = model(torch.tensor([one.tokens])).logits[0].double()
        likely = torch.log_softmax(logits, dim=-1)
        places = range(one.start, len(one.tokens))
        expected.append(sum(float(likely[place - 1, one.tokens[place]]) for place in places))
        terms = max(terms, len(places))
    # Logits are of size 1, from chains of products with some hundred terms each.
    tolerance = terms * 1000 * 2.0**-24
    assert tolerance < 1e-2 * float(np.ptp(expected))
    np.testing.assert_allclose(open_eager(checkpoint)(question), expected, rtol=0, atol=tolerance)
