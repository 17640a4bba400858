"""What runs in Triton's interpreter: in processes of their own, for the mode is a process's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.optional import require

require("triton")

FOLDER = Path(__file__).parent


@pytest.mark.parametrize("name", ["interpreted_kernel.py", "interpreted_op.py"])
def test_interpreted(name: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / name)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
