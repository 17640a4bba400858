"""Skipped tests are one line of pytest's summary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.skips import summarize

ROOT = Path(__file__).parents[1]


def test_reasons_are_counted_and_those_of_the_processor_are_one() -> None:
    amx, vnni = (f"this processor has no {isa}" for isa in ("amx", "avx512_vnni"))
    root = "root may write anywhere"
    assert summarize([root, amx, vnni, amx]) == (
        "4 skipped: 3 this processor has no amx/avx512_vnni, 1 root may write anywhere"
    )
    assert summarize([root]) == "1 skipped: 1 root may write anywhere"


def test_summary_is_one_line_before_the_closing_one(tmp_path: Path) -> None:
    (tmp_path / "test_skipping.py").write_text(
        """
import pytest

@pytest.mark.parametrize("isa", ["amx", "neon"])
def test_kernel(isa):
    pytest.skip(f"this processor has no {isa}")

def test_passes():
    pass
"""
    )
    (tmp_path / "test_missing.py").write_text(
        """
import pytest

pytest.skip("triton is not installed", allow_module_level=True)
"""
    )
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            ROOT / "pyproject.toml",
            "--rootdir",
            ROOT,
            tmp_path,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    *_, summary, closing = done.stdout.splitlines()
    assert summary == ("3 skipped: 2 this processor has no amx/neon, 1 triton is not installed"), (
        done.stdout
    )
    assert "1 passed, 3 skipped" in closing
    assert done.stdout.count("this processor has no") == 1
