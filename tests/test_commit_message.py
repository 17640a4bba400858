"""The hook for commit messages takes good subjects and names what is wrong with others."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HOOK = ROOT / ".ci" / "commit-msg"

LONGEST = "docs: " + "x" * 66


def check(message: str, folder: Path) -> subprocess.CompletedProcess[str]:
    path = folder / "COMMIT_EDITMSG"
    path.write_text(message, encoding="utf-8")
    return subprocess.run([HOOK, path], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "message",
    [
        "passes: reject a rank above the size of the matrix\n",
        "passes: reject a rank\n\nA body, whose lines are not looked at: " + "x" * 100 + "\n",
        "examples/smollm2: quote the demo\n",
        "compiler, runtime: name the folder in every error\n",
        ".ci: check subjects\n",
        "docs: README of 120 lines\n",
        f"{LONGEST}\n",
        "docs: " + "é" * 66 + "\n",
        "# a comment of git\n\npasses: reject a rank\n# another\n",
        "Merge branch 'main' into a branch whose name is longer than a subject may be, by far\n",
        'Revert "passes: reject a rank above the size of a matrix that somebody has"\n',
        'Reapply "passes: reject a rank above the size of a matrix that somebody has"\n',
        "fixup! passes: reject a rank above the size of a matrix that somebody has\n",
        "squash! Anything\n",
        "amend! Anything\n",
        "",
    ],
)
def test_good_subject_passes(message: str, tmp_path: Path) -> None:
    done = check(message, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("subject", "problem"),
    [
        (f"{LONGEST}x", "has 73 characters, and 72 are allowed"),
        ("Reject a rank above the size of the matrix", "names no area"),
        ("Passes: reject a rank", "names no area"),
        ("passes : reject a rank", "names no area"),
        ("passes:reject a rank", "names no area"),
        ("passes:", "names no area"),
        (": reject a rank", "names no area"),
        ("passes: reject a rank.", "ends with a full stop"),
        ("Mergers: reject a rank", "names no area"),
    ],
)
def test_bad_subject_is_refused_with_the_reason(subject: str, problem: str, tmp_path: Path) -> None:
    done = check(f"{subject}\n\nwhy: it cannot be\n", tmp_path)
    assert done.returncode == 1
    assert problem in done.stderr
    assert subject in done.stderr
    assert "write 'area: what'" in done.stderr


def test_pre_commit_installs_the_hook() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert set(config["default_install_hook_types"]) == {"pre-commit", "commit-msg"}
    hooks = {hook["id"]: hook for repo in config["repos"] for hook in repo["hooks"]}
    assert hooks["commit-msg"]["entry"] == ".ci/commit-msg"
    assert hooks["commit-msg"]["stages"] == ["commit-msg"]
    assert config["default_stages"] == ["pre-commit"]
