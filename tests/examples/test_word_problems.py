from __future__ import annotations

import re

from examples.smollm2.word_problems import word_problems

SOURCE = """
def generate_{number}(rng, difficulty=1.0):
    def generate_from_variables(name: str, things: str, count: int):
        total = count * 2
        question = f"Kind {number}: {{name}} has {{count}} {{things}}, and {{name}} gets {{count}}."
        return {{"question": question}}

    def generate_example(rng, difficulty=1.0):
        names = ["Ann", "Bob"]
        name = rng.choice(names)
        things = rng.choice(["pears", "nuts"])
        count = rng.randint(2, 9)
        raise SystemExit("templates are not run")
"""

UNKNOWN = """
def generate_9(rng, difficulty=1.0):
    def generate_from_variables(name: str):
        question = f"Nobody knows {name}."
        return question

    def generate_example(rng):
        name = somewhere_else()
"""


def problems(*, held_out: bool, rounds: int = 3) -> list[str]:
    source = "".join(SOURCE.format(number=number) for number in range(8)) + UNKNOWN
    text = word_problems(source.encode(), held_out=held_out, rounds=rounds).decode()
    return text.strip().split("\n\n")


def test_gaps_are_filled_with_words_of_their_lists_and_numbers() -> None:
    for problem in problems(held_out=False):
        match = re.fullmatch(
            r"Kind \d: (Ann|Bob) has (\d+) (pears|nuts), and (\w+) gets (\d+)\.", problem
        )
        assert match is not None
        assert match.group(1) == match.group(4), "a variable is one word throughout"
        assert match.group(2) == match.group(5)
    assert len(set(problems(held_out=False))) > 12, "rounds differ"


def test_no_kind_is_both_solved_on_and_held_out() -> None:
    kinds = [{one[:6] for one in problems(held_out=part)} for part in (False, True)]
    assert kinds == [
        {f"Kind {number}" for number in (0, 1, 2, 4, 5, 6)},
        {f"Kind {number}" for number in (3, 7)},
    ]
    assert problems(held_out=True) == problems(held_out=True)
    assert not any("Nobody" in one for one in problems(held_out=False, rounds=1))
