from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.tiny_artifact import write_tiny_artifact

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def tiny_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that no test may change; copy it first."""
    return write_tiny_artifact(tmp_path_factory.mktemp("tiny"))
