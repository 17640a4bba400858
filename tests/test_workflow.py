"""Continuous integration runs .ci/run on every Python that the package supports."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]


def test_workflow_runs_every_supported_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    supported = [
        found[1]
        for classifier in project["classifiers"]
        if (found := re.search(r"Python :: (3\.\d+)$", classifier))
    ]
    path = ROOT / ".github" / "workflows" / "ci.yml"
    (job,) = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == supported
    (step,) = [step for step in job["steps"] if step.get("run") == ".ci/run"]
    assert step["env"]["PYTHON"] == "python${{ matrix.python }}"


def test_checks_are_targets_of_the_makefile() -> None:
    (targets,) = re.findall(
        r"^make (.+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.MULTILINE
    )
    known = re.findall(
        r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(targets.split()) <= set(known)
