from __future__ import annotations

from pathlib import Path

import pytest

from eoracc.plugins.library import library_path


@pytest.fixture(params=["function", "kernel"])
def library(request: pytest.FixtureRequest) -> Path | None:
    """No library, so that the function runs, or the native one."""
    return library_path() if request.param == "kernel" else None
