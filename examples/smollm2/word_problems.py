"""Grade-school word problems from the templates of reasoning-gym, without running its code.

The package defines each kind of problem as a Python function: a question with gaps, and lists of
names and things that fill them. The source is parsed, never imported. Names and things come from
those lists, and numbers are small. Only questions are used, because the answers would need the
package's code.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["word_problems"]

_NUMBERS = [str(number) for number in range(2, 61)]
"""Values for gaps that have no list of words."""


def word_problems(source: bytes, *, held_out: bool, rounds: int) -> bytes:
    """Problems of the calibration kinds, or of the held-out kinds.

    Every fourth kind is held out, so the two texts share no question, not even one with other
    numbers.

    Args:
      source: Python files of reasoning-gym's ``gsm_symbolic``, joined.
      held_out: use the held-out kinds.
      rounds: problems of each kind.

    Returns:
      UTF-8 text, one problem a paragraph.
    """
    problems = [
        template.fill(f"{number} {kind}")
        for number in range(rounds)
        for kind, template in enumerate(_templates(source.decode()))
        if (kind % 4 == 3) == held_out
    ]
    return ("\n\n".join(problems) + "\n").encode()


@dataclass(frozen=True)
class _Template:
    """One kind of problem.

    Attributes:
      question: with gaps.
      choices: words for a gap, by its variable; other gaps get numbers.
    """

    question: ast.JoinedStr
    choices: Mapping[str, list[str]]

    def fill(self, key: str) -> str:
        """The question; ``key`` picks one word or number for each variable."""
        parts = []
        for part in self.question.values:
            if isinstance(part, ast.Constant):
                parts.append(str(part.value))
                continue
            words = self.choices.get(_name(part), _NUMBERS)
            # A hash, so that the text is the same on every machine.
            picked = hashlib.sha256(f"{key} {_name(part)}".encode())
            parts.append(words[int.from_bytes(picked.digest()[:8]) % len(words)])
        return " ".join("".join(parts).split())


def _templates(source: str) -> Iterator[_Template]:
    """The kinds for which every gap is known to hold a word or a number."""
    for function in ast.parse(source).body:
        if not isinstance(function, ast.FunctionDef):
            continue
        values = dict(_assignments(function))
        question = values.get("question")
        if not isinstance(question, ast.JoinedStr):
            continue
        choices = {name: texts for name in values if (texts := _choices(name, values))}
        words = {
            argument.arg
            for inner in ast.walk(function)
            if isinstance(inner, ast.FunctionDef)
            for argument in inner.args.args
            if isinstance(argument.annotation, ast.Name) and argument.annotation.id == "str"
        }
        gaps = {_name(part) for part in question.values if isinstance(part, ast.FormattedValue)}
        if "" not in gaps and not (gaps & words) - choices.keys():
            yield _Template(question, choices)


def _assignments(function: ast.FunctionDef) -> Iterator[tuple[str, ast.expr]]:
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def _choices(name: str, values: Mapping[str, ast.expr]) -> list[str]:
    """The texts of ``name = rng.choice(texts)``; an empty list for any other assignment."""
    drawn = values[name]
    if not isinstance(drawn, ast.Call) or ast.unparse(drawn.func) != "rng.choice":
        return []
    texts: ast.expr | None = drawn.args[0]
    if isinstance(texts, ast.Name):
        texts = values.get(texts.id)
    if not isinstance(texts, ast.List):
        return []
    constants = [item.value for item in texts.elts if isinstance(item, ast.Constant)]
    strings = [text for text in constants if isinstance(text, str)]
    return strings if len(strings) == len(texts.elts) else []


def _name(part: ast.expr) -> str:
    """The variable of a gap; empty for any other expression."""
    value = part.value if isinstance(part, ast.FormattedValue) else None
    return value.id if isinstance(value, ast.Name) else ""
