from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

WHOLE = ["write", "replace", "replace-by-renames"]
"""Changes of the whole folder, in milliseconds each."""

FILES = ["adapter-add", "adapter-remove", "adapter-import"]
"""Changes of files in the folder."""


def figures(*arguments: str, timeout_s: float) -> dict[str, dict[str, Any]]:
    # Forks of a process with threads of its own may wait for ever.
    alone = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", *arguments],
        cwd=ROOT,
        env=os.environ | alone,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=timeout_s,
    )
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return found


def test_killed_at_every_file_operation() -> None:
    found = figures(*WHOLE, *FILES, "adapter-export", timeout_s=300)
    assert [name for name, each in found.items() if each["failures"]] == [], found
    for name, each in found.items():
        # The kills went through the whole change, and there was something to clear away.
        assert each["kills"] >= 10
        if name != "adapter-export":  # beside the artifact, which stays as it is
            assert each["old"] > 0
            assert each["new"] > 0
            assert each["old"] + each["new"] == each["kills"]
        assert (each["left_over"] > 0) == (name not in FILES)


def test_killed_build_is_finished_by_the_next() -> None:
    """At a few operations; ``python -m tests.kills build build-force adapter-solve`` is at all."""
    (build,) = figures("build", "--every", "58", timeout_s=300).values()
    assert build["failures"] == []
    assert build["kills"] >= 2
    assert build["left_over"] >= 1
