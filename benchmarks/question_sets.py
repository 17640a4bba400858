"""Multiple-choice questions from a published package: MMLU, Social IQa and LogiQA.

The wheel ``evals`` contains 1,000 questions of MMLU, 2,224 of Social IQa and 1,354 of LogiQA, each
as one text with lettered choices. Here a question is a prompt and its choices, and a model is
scored by the likelihood of each choice after the prompt: small models cannot use letters, but they
can rank answers by plausibility. Repeated questions (all of LogiQA's) are kept once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tokenizers import Tokenizer

from examples.packages import Source, assemble

__all__ = [
    "SETS",
    "EncodedChoice",
    "Question",
    "QuestionSet",
    "draw",
    "encode_choices",
    "load_questions",
    "write_tasks",
]

_PACKAGE = "evals==3.0.1.post1"
_DATA = "evals/registry/data"


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      prompt: ends where the answer begins, without a space.
      choices: without a space in front.
      answer: index of the correct choice.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class EncodedChoice:
    """One choice after its prompt.

    Attributes:
      tokens: of both.
      start: index of the first token of the choice.
    """

    tokens: list[int]
    start: int


@dataclass(frozen=True)
class QuestionSet:
    """The source of one set of questions.

    Attributes:
      name: in tables and file names.
      source: the file in the package, one JSON value a line.
      parse: converts the value of a line to a question.
    """

    name: str
    source: Source
    parse: Callable[[Any], Question]


def _mmlu(record: Any) -> Question:
    question, *choices = _groups(
        r"(.*?)\n+A\. (.*)\nB\. (.*)\nC\. (.*)\nD\. (.*)\nAnswer:", record["question"]
    )
    return _question(f"Question: {question}\nAnswer:", choices, record["answer"])


def _social_iqa(record: Any) -> Question:
    (message,) = record["input"]
    question, *choices = _groups(r"(.*?) A: (.*); B: (.*); C: (.*?)\.?", message["content"])
    return _question(f"Question: {question}\nAnswer:", choices, record["ideal"])


def _logiqa(record: Any) -> Question:
    passage, question, *choices = _groups(
        r"\nPassage: (.*?)Question: (.*?)"
        r"\nA\. A\.(.*)\nB\. B\.(.*)\nC\. C\.(.*)\nD\. D\.(.*)\nAnswer:",
        record["input"][-1]["content"],
    )
    return _question(f"Passage: {passage}\nQuestion: {question}\nAnswer:", choices, record["ideal"])


def _groups(pattern: str, text: str) -> list[str]:
    match = re.fullmatch(pattern, text, re.DOTALL)
    if match is None:
        raise ValueError(f"this is no question with choices: {text!r}")
    return [group.strip() for group in match.groups()]


def _question(prompt: str, choices: Sequence[str], letter: str) -> Question:
    return Question(prompt, tuple(choices), "ABCD"[: len(choices)].index(letter))


def _source(member: str, sha256: str) -> Source:
    path = f"{_DATA}/{member}"
    return Source(Path(member).name, (_PACKAGE,), lambda name: name == path, sha256)


SETS = (
    QuestionSet(
        "mmlu",
        _source(
            "sandbagging/samples-all-large.jsonl",
            "ae8f5342c41efd39921ee0e16c19c3ac3ef09cd8cf367158b47c69592e8f8fac",
        ),
        _mmlu,
    ),
    QuestionSet(
        "social_iqa",
        _source(
            "theory_of_mind/socialiqa/test.jsonl",
            "33e5a7e1f8270934fcff115f18ca51aede77987d1225cf3ac718a22fb1715714",
        ),
        _social_iqa,
    ),
    QuestionSet(
        "logiqa",
        _source(
            "logiqa/logiqa.jsonl",
            "0fcd58f776f5a49ccd4da8d21b4496873a6291e4d976be5d6bdd43df48cabd52",
        ),
        _logiqa,
    ),
)


def load_questions(
    folder: Path, *, limit: int | None = None, seed: int = 0
) -> dict[str, list[Question]]:
    """The questions of every set by its name; missing files are fetched into ``folder``.

    Args:
      folder: for the downloaded files.
      limit: at most so many of each set, drawn without replacement and kept in order; None for all.
      seed: of the draw.

    Raises:
      SystemExit: the package cannot be downloaded, or its content is not as expected.
    """
    paths = assemble([question_set.source for question_set in SETS], folder)
    return {
        question_set.name: draw(_parsed(question_set, path), limit, seed)
        for question_set, path in zip(SETS, paths, strict=True)
    }


def _parsed(questions: QuestionSet, path: Path) -> list[Question]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return list(dict.fromkeys(questions.parse(json.loads(line)) for line in lines))


def draw(questions: list[Question], limit: int | None, seed: int) -> list[Question]:
    """At most ``limit`` of ``questions`` (None: all), without replacement, in their order.

    A larger draw with the same seed contains the smaller one, so its cached scores are reused.
    """
    kept = np.random.default_rng(seed).permutation(len(questions))[:limit]
    return [questions[index] for index in sorted(kept)]


def encode_choices(tokenizer: Tokenizer, question: Question) -> list[EncodedChoice]:
    """The tokens of every choice after the prompt, separated by a space.

    Prompt and choice are encoded together and split at the end of the prompt, as in lm-eval.
    """
    start = len(tokenizer.encode(question.prompt).ids)
    return [
        EncodedChoice(tokenizer.encode(f"{question.prompt} {choice}").ids, start)
        for choice in question.choices
    ]


def write_tasks(questions: dict[str, list[Question]], folder: Path) -> list[str]:
    """Write the questions as tasks of lm-eval: ``<task>.yaml`` and ``<task>.jsonl`` for each set.

    Args:
      questions: by the name of their set.
      folder: for ``lm_eval --include_path``; created.

    Returns:
      The names of the tasks, ``eoracc_<set>``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tasks = []
    for name, asked in questions.items():
        task = f"eoracc_{name}"
        data = (folder / f"{task}.jsonl").resolve()
        data.write_text(_lines(asked), encoding="utf-8")
        content = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "output_type": "multiple_choice",
            "test_split": "test",
            "doc_to_text": "prompt",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            "metadata": {"version": 1.0},
        }
        (folder / f"{task}.yaml").write_text(
            yaml.safe_dump(content, sort_keys=False), encoding="utf-8"
        )
        tasks.append(task)
    return tasks


def _lines(questions: Iterable[Question]) -> str:
    return "".join(
        json.dumps(asdict(question), ensure_ascii=False) + "\n" for question in questions
    )
