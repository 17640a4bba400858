from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny_artifact import tiny_factors, tiny_slots, write_tiny_artifact

ADAPTERS = ("math", "prose")


@pytest.fixture(scope="session")
def adapted_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with two adapters that change its answers; no test may change it."""
    from eoracc.runtime.adapters.adapter import Adapter
    from eoracc.runtime.adapters.store import add_adapter
    from eoracc.runtime.artifact.manifest import read_manifest

    folder = write_tiny_artifact(tmp_path_factory.mktemp("adapted"), adapter_type="int8")
    slots, digest = tiny_slots(folder), read_manifest(folder).digest
    for seed, name in enumerate(ADAPTERS):
        factors = tiny_factors(slots, rank=4, seed=seed, size=1.0)
        add_adapter(folder, Adapter(name, factors, digest))
    return folder
