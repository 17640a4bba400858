"""Changed files of every kind end in one sentence: no trace, hang, signal or flood of memory.

``python -m tests.fuzz.mutate`` runs more of the same, with another seed.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.fuzz.kinds import KINDS
from tests.fuzz.mutate import choose_cases, table
from tests.fuzz.mutations import FORMS, Random
from tests.fuzz.pool import FAULTS, run_cases
from tests.fuzz.templates import write_templates

COUNT = 500
SEED = 15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Templates and a place to work."""
    folder = tmp_path_factory.mktemp("fuzz")
    write_templates(folder / "templates")
    (folder / "work").mkdir()
    return folder


def test_changed_files_end_in_a_sentence(folder: Path) -> None:
    cases = choose_cases(COUNT)
    templates = folder / "templates"
    outcomes = list(run_cases(templates, folder / "work", cases, seed=SEED))
    faults = [outcome for outcome in outcomes if outcome.verdict in FAULTS]
    said = [f"{fault.case} {fault.verdict}: {fault.detail[-500:]}" for fault in faults]
    assert not said, "\n".join([*said, table(outcomes)])
    # Neither side is empty: files are read, and most changes are noticed.
    verdicts = [outcome.verdict for outcome in outcomes]
    assert len(verdicts) == COUNT
    assert min(verdicts.count("accepted"), verdicts.count("refused")) > COUNT / 10


@pytest.mark.parametrize("form", FORMS)
def test_a_mutation_is_its_seed(folder: Path, form: str) -> None:
    path = next(kind.name for kind in KINDS.values() if kind.form == form)
    content = (folder / "templates" / path).read_bytes()
    changed = [FORMS[form](Random(seed), content) for seed in range(40)]
    assert changed == [FORMS[form](Random(seed), content) for seed in range(40)]
    assert sum(item != content for item in changed) > 30


def test_some_changed_json_is_still_json() -> None:
    content = json.dumps({"a": [1, 2.5, "x"], "b": {"c": None, "d": True}}).encode()
    sound = 0
    for seed in range(100):
        try:
            json.loads(FORMS["json"](Random(seed), content))
        except (ValueError, RecursionError):
            continue
        sound += 1
    assert 40 < sound < 95
