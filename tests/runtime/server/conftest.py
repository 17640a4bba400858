from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.server.child import ServerProcess


@pytest.fixture(scope="session")
def server(adapted_artifact: Path) -> Iterator[ServerProcess]:
    """A server that tests share; four rows, so that they meet in batches."""
    with ServerProcess(adapted_artifact, "--rows", "4", "--max-waiting", "300") as one:
        yield one
