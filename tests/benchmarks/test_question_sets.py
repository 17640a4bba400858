from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer

from benchmarks.question_sets import SETS, Question, QuestionSet, draw, encode_choices, write_tasks
from tests.tiny_artifact import write_byte_tokenizer

RECORDS = {
    "mmlu": {
        "question": "What is\n2 + 2?\n\nA. 3\nB. 4\nC. 5\nD. A. or B.\nAnswer:",
        "answer": "B",
    },
    "social_iqa": {
        "input": [{"role": "user", "content": "Jo ran. Why? A: late; B: to win; the race; C: no."}],
        "ideal": "C",
    },
    "logiqa": {
        "input": [
            {"role": "system", "content": "Choose."},
            {
                "role": "user",
                "content": "\nPassage: All P.\nOr Q.Question: So?"
                "\nA. A.P.\nB. B.Q.\nC. C.R.\nD. D.none\nAnswer:",
            },
        ],
        "ideal": "D",
    },
}
QUESTIONS = {
    "mmlu": Question("Question: What is\n2 + 2?\nAnswer:", ("3", "4", "5", "A. or B."), 1),
    "social_iqa": Question(
        "Question: Jo ran. Why?\nAnswer:", ("late", "to win; the race", "no"), 2
    ),
    "logiqa": Question(
        "Passage: All P.\nOr Q.\nQuestion: So?\nAnswer:", ("P.", "Q.", "R.", "none"), 3
    ),
}


@pytest.mark.parametrize("one", SETS, ids=lambda one: one.name)
def test_a_record_is_taken_apart(one: QuestionSet) -> None:
    assert one.parse(RECORDS[one.name]) == QUESTIONS[one.name]


@pytest.mark.parametrize("one", SETS, ids=lambda one: one.name)
def test_a_record_of_another_form_is_an_error(one: QuestionSet) -> None:
    record = json.loads(json.dumps(RECORDS[one.name]).replace("B", "F"))
    with pytest.raises(ValueError, match="this is no question with choices"):
        one.parse(record)


def some(count: int) -> list[Question]:
    return [Question(f"{index}?", ("yes", "no"), index % 2) for index in range(count)]


def test_a_draw_is_repeatable_in_order_and_without_replacement() -> None:
    questions = some(50)
    drawn = draw(questions, 20, seed=3)
    assert len(set(drawn)) == 20
    assert drawn == sorted(drawn, key=questions.index)
    assert drawn == draw(questions, 20, seed=3) != draw(questions, 20, seed=4)
    assert set(drawn) < set(draw(questions, 21, seed=3))
    assert draw(questions, None, seed=0) == draw(questions, 99, seed=0) == questions


def test_choices_are_encoded_with_the_prompt(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, bos=True)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text, one in zip((" yes", " no"), encode_choices(tokenizer, some(1)[0]), strict=True):
        assert one.tokens[0] == 1  # BOS, which the tokenizer begins a text with
        assert tokenizer.decode(one.tokens[: one.start]) == "0?"
        assert tokenizer.decode(one.tokens[one.start :]) == text


def test_tasks_hold_the_same_questions(tmp_path: Path) -> None:
    assert write_tasks({"odd": some(2), "even": some(1)}, tmp_path) == ["eoracc_odd", "eoracc_even"]
    task = yaml.safe_load((tmp_path / "eoracc_odd.yaml").read_text())
    data = Path(task["dataset_kwargs"]["data_files"]["test"])
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    assert [
        Question(
            line[task["doc_to_text"]],
            tuple(line[task["doc_to_choice"]]),
            line[task["doc_to_target"]],
        )
        for line in lines
    ] == some(2)
